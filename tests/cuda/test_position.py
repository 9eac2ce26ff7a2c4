"""The CUDA kernels of position attention, emulated: what the operator suite cannot see. Work and traffic against the
arithmetic of docs/results.md, the paths a problem or a device chooses, and the builds that look for faults."""

import math
import os
import re

import pytest
import torch

from segattn_ops import _precision

from ..emulated import assert_same_bits, conflicts, global_bytes, run_in
from ..region_features import region_features
from ..tolerance import assert_as_exact_as_eager, assert_norm_as_exact_as_eager

N97 = 97 * 97
OPERATORS = torch.ops.segattn_emulated
RESULTS = ("output", "logsumexp", "grad_query", "grad_key", "grad_value")


def inputs(batch, embedding, channels, queries, keys, dtype, seed=0):
    """query, key, value and grad_output"""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(embedding, queries), (embedding, keys), (channels, keys), (channels, queries)]
    return [torch.randn((batch, *shape), generator=generator).to(dtype) for shape in shapes]


def eager(query, key, value, grad_output, scale=1.0):
    """output, logsumexp and the three gradients by PyTorch"""
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    energy = scale * leaves[0].transpose(1, 2) @ leaves[1]
    output = leaves[2] @ energy.softmax(2).transpose(1, 2)
    return output.detach(), energy.logsumexp(2).detach(), *torch.autograd.grad(output, leaves, grad_output)


def exact(query, key, value, grad_output, scale=1.0):
    """The same in float64"""
    return eager(*(t.double() for t in (query, key, value, grad_output)), scale)


def run(query, key, value, grad_output, scale=1.0):
    output, logsumexp, low = OPERATORS.position_attention(query, key, value, scale, True)
    low = low if low.shape[1] > 0 else None
    return (
        output,
        logsumexp,
        *OPERATORS.position_attention_backward(grad_output, query, key, value, output, logsumexp, scale, low),
    )


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def assert_close(tensors, tolerance, scale=1.0):
    for got, expected in zip(run(*tensors, scale), exact(*tensors, scale), strict=True):
        assert relative_error(got, expected) < tolerance


def launches(emulator, *name_parts):
    return [r for r in emulator.report() if all(part in r["kernel"] for part in name_parts)]


def kernels(emulator):
    return [r["kernel"] for r in emulator.report()]


# ---- work ------------------------------------------------------------------------------------------------------------


def blocks(positions, size):
    return math.ceil(positions / size)


def test_forward_computes_little_more_than_it_must(emulator):
    """mma FLOPs of 128-query blocks and 32-key steps, counted on two blocks and ten steps, at 97 x 97, C = 512."""
    emulator.set_device(90, 1)  # nothing to fill: no splits
    query, key, value, _ = inputs(1, 64, 512, 256, 320, torch.bfloat16)
    OPERATORS.position_attention(query, key, value, 1.0)
    (launch,) = launches(emulator, "weighted_sum_kernel")
    whole = launch["mma_flops"] / (2 * 10) * blocks(N97, 128) * blocks(N97, 32)
    needed = 2 * N97**2 * (64 + 512)
    assert needed <= whole <= 1.15 * needed


def test_backward_computes_little_more_than_it_must(emulator):
    """The same for the backward: 2 x 2 tiles of 128 x 128 and, for the value gradient, 2 blocks of 8 steps."""
    emulator.set_device(90, 1)
    run(*inputs(1, 64, 512, 256, 256, torch.bfloat16))
    (value_gradient,) = launches(emulator, "weighted_sum_kernel", "false")
    (query_key_gradient,) = launches(emulator, "query_key_gradient_kernel")
    whole = value_gradient["mma_flops"] / (2 * 8) * blocks(N97, 128) * blocks(N97, 32)
    whole += query_key_gradient["mma_flops"] / 4 * blocks(N97, 128) ** 2
    needed = 2 * N97**2 * (3 * 64 + 2 * 512)
    assert needed <= whole <= 1.4 * needed


def test_3xtf32_multiplies_three_times(emulator):
    tensors = inputs(1, 16, 40, 70, 50, torch.float32)
    flops = []
    for allow in (False, True):
        OPERATORS._set_allow_tf32(allow)
        emulator.reset()
        OPERATORS.position_attention(*tensors[:3], 1.0)
        (launch,) = launches(emulator, "weighted_sum_kernel")
        assert launch["mma_flops"] == launch["mma_flops_by_type"]["tf32"]
        flops.append(launch["mma_flops"])
    assert flops[0] == 3 * flops[1] > 0


# ---- traffic ---------------------------------------------------------------------------------------------------------


def test_forward_traffic_is_what_its_tiling_implies(traced):
    """A block takes its queries once and all keys and 256 value channels; at 97 x 97, C = 512, that is 0.9 GB for the
    148 blocks of a sample beside the 22 MB that any kernel must move: it is L2 that serves the difference."""
    traced.set_device(90, 1)
    query, key, value, _ = inputs(1, 64, 512, 256, 320, torch.bfloat16)
    OPERATORS.position_attention(query, key, value, 1.0)
    (launch,) = launches(traced, "weighted_sum_kernel")
    moved = global_bytes(launch)
    per_block = 2 * (64 * 128 + (64 + 256) * 320)
    assert moved["global_async_read"] <= 1.05 * 4 * per_block
    written = 2 * 512 * 256 + 4 * 256
    assert sum(moved.values()) <= 1.25 * (4 * per_block + written)
    whole = blocks(N97, 128) * 2 * 2 * (64 * 128 + (64 + 256) * N97)
    minimum = 2 * N97 * (64 + 64 + 512 + 512)
    assert 0.85e9 < whole < 0.95e9 and 21e6 < minimum < 22e6  # what the docstring and docs/results.md say


def test_backward_traffic_is_what_its_tiling_implies(traced):
    traced.set_device(90, 1)
    run(*inputs(1, 64, 512, 256, 256, torch.bfloat16))
    (launch,) = launches(traced, "query_key_gradient_kernel")
    chunks = 2 * 512 * (128 + 128)  # grad_output and value of a tile
    tiles = 4 * (chunks + 2 * 64 * 128) + 2 * 2 * 64 * 128  # and key; query once for two tiles
    partials = 4 * 64 * (256 + 3 * 256)  # grad_query written once; grad_key written, read, written
    assert sum(global_bytes(launch).values()) <= 1.25 * (tiles + partials)


@pytest.mark.parametrize("precision", ["bfloat16", "tf32", "3xtf32"])
def test_no_bank_conflicts(traced, precision):
    OPERATORS._set_allow_tf32(precision == "tf32")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    run(*inputs(1, 64, 256, 256, 256, dtype))
    for kernel in ("weighted_sum_kernel", "query_key_gradient_kernel"):
        for launch in launches(traced, kernel):
            assert conflicts(launch) <= 1.1, launch["kernel"]


# ---- paths -----------------------------------------------------------------------------------------------------------


def test_split_keys(emulator):
    """64 queries fill one of 132 multiprocessors: the keys are split, the merge has the whole log-sum-exp."""
    tensors = inputs(1, 16, 40, 64, 1100, torch.float16)
    assert_close(tensors, 2e-3)
    assert len(launches(emulator, "merge_splits_kernel")) == 1
    emulator.set_device(90, 1)
    emulator.reset()
    assert_close(tensors, 2e-3)
    assert not launches(emulator, "merge_splits_kernel")


def test_split_queries(emulator):
    """The value gradient of 64 keys: the queries are split and their shares summed, as grad_query and grad_key are."""
    tensors = inputs(1, 16, 40, 1100, 64, torch.float16)
    assert_close(tensors, 2e-3)
    assert len(launches(emulator, "sum_partials_kernel")) == 3
    emulator.set_device(90, 1)
    emulator.reset()
    assert_close(tensors, 2e-3)
    assert len(launches(emulator, "sum_partials_kernel")) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_that_do_not_stay_in_registers(emulator, dtype):
    """E beyond 64 on one multiprocessor: a block takes several key blocks and query blocks, and adds to what it has
    written of either gradient."""
    emulator.set_device(90, 1)
    assert_close(inputs(1, 100, 24, 130, 200, dtype), 2e-2 if dtype == torch.bfloat16 else 2e-6, scale=0.1)
    (launch,) = launches(emulator, "query_key_gradient_kernel")
    assert launch["grid"][0] == 1


def test_split_keys_with_scores_far_apart(emulator):
    """The splits' maxima differ by hundreds: the lesser weigh nothing, and nothing overflows."""
    query, key, value, grad_output = inputs(1, 8, 24, 64, 600, torch.bfloat16)
    key[:, :, 450:] *= 60
    assert_close([query, key, value, grad_output], 2e-2)
    assert launches(emulator, "merge_splits_kernel")


def test_rows_are_packed_only_where_they_must_be(emulator):
    """Rows of 97 elements do not start on 16 bytes, rows of 96 do; the packed rows give the same bits."""
    query, key, value, grad_output = inputs(1, 16, 24, 96, 96, torch.bfloat16)
    aligned = run(query, key, value, grad_output)
    assert not launches(emulator, "pack_rows_kernel")

    def shifted(t):
        return torch.cat([t.new_full((1,), math.nan), t.flatten()])[1:].view(t.shape)

    packed = run(*(shifted(t) for t in (query, key, value, grad_output)))
    assert len(launches(emulator, "pack_rows_kernel")) == 3 + 4
    for a, b in zip(aligned, packed, strict=True):
        assert torch.equal(a, b)
    assert_close(inputs(2, 16, 24, 97, 97, torch.bfloat16), 2e-2)


@pytest.mark.parametrize(
    ("architecture", "embedding", "channels", "expected"),
    [
        (90, 64, 512, {"Mma16"}),
        (90, 16, 40, {"Mma16"}),
        (86, 64, 136, {"Mma16"}),  # two stages
        (90, 80, 136, {"Mma16"}),
        (86, 200, 136, {"Mma16"}),
        (86, 300, 24, {"simt"}),  # no room in 99 KB
        (75, 40, 24, {"simt"}),  # no bfloat16 or m16n8k16 there
        (80, 512, 24, {"Mma16"}),
    ],
)
def test_every_device_and_channel_count_has_a_path(emulator, architecture, embedding, channels, expected):
    emulator.set_device(architecture)
    tensors = inputs(1, embedding, channels, 70, 90, torch.float16)
    assert_close(tensors, 3e-3, scale=embedding**-0.5)
    names = kernels(emulator)
    used = {"simt" if "simt" in n else "Mma16" for n in names if "simt" in n or "Mma16" in n}
    assert used == expected, names


@pytest.mark.parametrize(
    ("dtype", "architecture", "forward", "backward"),
    [
        (torch.bfloat16, 86, 288, 256),
        (torch.bfloat16, 80, 544, 512),
        (torch.bfloat16, 90, 800, 768),
        (torch.float32, 86, 192, 64),
        (torch.float32, 80, 368, 192),
        (torch.float32, 90, 536, 320),
    ],
    ids=str,
)
def test_embeddings_up_to_here_take_tensor_cores(emulator, dtype, architecture, forward, backward):
    """The bounds that README and docs/decisions.md state; the value gradient has the forward's."""
    emulator.set_device(architecture)
    emulator.set_blocks_at_ends(0)
    for embedding in (backward, backward + 1, forward, forward + 1):
        tensors = inputs(1, embedding, 8, 70, 90, dtype)
        emulator.reset()
        run(*tensors)
        scalar = {int(part) for k in kernels(emulator) for part in re.findall(r"\(segattn::cuda::PositionSum\)(\d)", k)}
        expected = ({0, 1} if embedding > forward else set()) | ({2, 3} if embedding > backward else set())
        if dtype == torch.float32 and embedding > backward:
            expected.add(0)  # makes the mean key
        assert scalar == expected, embedding


@pytest.mark.parametrize("embedding", [64, 100])
@pytest.mark.parametrize("channels", [16, 200])
def test_float32_precision(emulator, channels, embedding):
    """3xTF32 has float32's accuracy; TF32, which is 2,000 times coarser, is there only for those who allow it."""
    tensors = inputs(1, embedding, channels, 150, 140, torch.float32)
    scale = embedding**-0.5
    errors = [relative_error(a, b) for a, b in zip(run(*tensors, scale), exact(*tensors, scale), strict=True)]
    assert max(errors) < 2e-6
    OPERATORS._set_allow_tf32(True)
    errors = [relative_error(a, b) for a, b in zip(run(*tensors, scale), exact(*tensors, scale), strict=True)]
    assert 5e-5 < max(errors) < 5e-3


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(64, N97), (N97, 64)])
def test_float32_sums_over_all_positions(emulator, architecture, positive, queries, keys):
    """Output and query gradient of 97 x 97 keys, value and key gradient of as many queries: sums of 9,409 products in
    one block, of which tensor cores cut off 1e-4 in one accumulator."""
    emulator.set_device(architecture, 1)
    tensors = inputs(1, 16, 16, queries, keys, torch.float32)
    if positive:
        tensors = [t.relu() for t in tensors]
    results = zip(run(*tensors, 0.25), eager(*tensors, 0.25), exact(*tensors, 0.25), strict=True)
    for name, (got, by_eager, in_float64) in zip(RESULTS, results, strict=True):
        assert_as_exact_as_eager(name, got, by_eager, in_float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_sums_over_all_positions(emulator, dtype):
    """The same in 16 bits, in one accumulator: what is cut off stays below the rounding of the results."""
    emulator.set_device(80, 1)
    for queries, keys in ((64, N97), (N97, 64)):
        tensors = inputs(1, 16, 16, queries, keys, dtype)
        emulator.set_mma_rounding("truncate")
        truncated = run(*tensors, 0.25)
        emulator.set_mma_rounding("nearest")
        for name, got, nearest in zip(RESULTS, truncated, run(*tensors, 0.25), strict=True):
            lost = (got.double() - nearest.double()).abs().max()
            assert lost <= torch.finfo(dtype).eps * nearest.double().abs().max(), name


@pytest.mark.parametrize("logit", [4.0, 8.0])
@pytest.mark.parametrize("architecture", [80, 90])
def test_16_bit_query_gradient_of_regions(emulator, architecture, logit):
    """delta from an output that tensor cores summed up over 97 x 97 keys: bfloat16 keeps the rule. In float16 what they
    cut off is as large as the rounding that output_low makes up for, and only a part of the error goes
    (docs/decisions.md)."""
    emulator.set_device(architecture, 1)
    for dtype in (torch.bfloat16, torch.float16):
        query, key, value = (t.flatten(2) for t in region_features(97, 97, 16, 64, dtype, logit))
        query = query[:, :, : 64 * 147 : 147].contiguous()
        grad_output = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
        tensors = query, key, value, grad_output
        got, by_eager, in_float64 = (function(*tensors)[2] for function in (run, eager, exact))
        if dtype == torch.bfloat16:
            assert_norm_as_exact_as_eager("grad_query", got, by_eager, in_float64)
        else:
            output, logsumexp, _ = OPERATORS.position_attention(*tensors[:3], 1.0)
            without = OPERATORS.position_attention_backward(grad_output, *tensors[:3], output, logsumexp, 1.0)[0]
            assert relative_error(got, in_float64) < 0.6 * relative_error(without, in_float64)


def test_tf32_setting_is_followed(emulator):
    tensors = inputs(1, 16, 24, 40, 40, torch.float32)
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    expected = exact(*tensors)[0]
    try:
        for precision, bounds in (("ieee", (0, 3e-6)), ("tf32", (5e-5, 5e-3)), ("ieee", (0, 3e-6))):
            settings.fp32_precision = precision
            assert _precision.follow_tf32_setting("segattn_emulated") == (precision == "tf32")
            output = OPERATORS.position_attention(*tensors[:3], 1.0)[0]
            assert bounds[0] < relative_error(output, expected) < bounds[1]
    finally:
        settings.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_any_schedule_gives_the_same_bits(emulator, dtype):
    tensors = inputs(1, 24, 40, 200, 300, dtype)
    assert_same_bits(emulator, lambda: run(*tensors))


def test_offsets_beyond_int32(emulator):
    """Two samples 2^31 elements apart in memory nobody touches in between."""
    if os.environ.get("SEGATTN_EMULATOR_VARIANT") == "asan":
        pytest.skip("the sanitizer's shadow would touch it")
    embedding, channels, positions = 8, 16, 64
    tensors = inputs(2, embedding, channels, positions, positions, torch.bfloat16)
    far = []
    for t in tensors[:3]:
        storage = torch.empty(2**31 + t[0].numel(), dtype=t.dtype)
        view = storage.as_strided(t.shape, (2**31, positions, 1))
        view.copy_(t)
        far.append(view)
    for a, b in zip(run(*tensors), run(*far, tensors[3]), strict=True):
        assert torch.equal(a, b)


def test_float64_gradients(emulator):
    leaves = [t.requires_grad_() for t in inputs(1, 5, 40, 33, 35, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *t: OPERATORS.position_attention(*t, 0.7)[0], leaves, fast_mode=True)


# ---- builds that look for faults -------------------------------------------------------------------------------------


def test_race_build(emulator):
    """Shared-memory races fail; memory accesses are counted."""
    run_in("race", __file__, "not build and not float64")


def test_asan_build(emulator):
    run_in("asan", __file__, "split or packed or path or precision")
