"""The CUDA kernels of position attention on the emulator, beyond the operator suite: work and traffic against the
estimates of docs/results.md, the kernels that a problem or device selects, and the race and address sanitizer
builds."""

import math
import os
import re

import pytest
import torch

from segattn_ops import _precision

from ..emulated import assert_same_bits, conflicts, global_bytes, run_in
from ..region_features import region_features
from ..tolerance import assert_as_exact_as_eager, assert_norm_as_exact_as_eager

# Of mma.sync; Hopper's kernels have tests of their own.
pytestmark = pytest.mark.usefixtures("without_wgmma")

N97 = 97 * 97
OPERATORS = torch.ops.segattn_emulated
RESULTS = ("output", "logsumexp", "grad_query", "grad_key", "grad_value")

# The PositionSum of a kernel's name
FORWARD, VALUE_GRADIENT, QUERY_GRADIENT, KEY_GRADIENT, CORRECTED_QUERY_GRADIENT = range(5)


def inputs(batch, key_channels, channels, queries, keys, dtype, seed=0):
    """query, key, value and grad_output"""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(key_channels, queries), (key_channels, keys), (channels, keys), (channels, queries)]
    return [torch.randn((batch, *shape), generator=generator).to(dtype) for shape in shapes]


def eager(query, key, value, grad_output, scale=1.0):
    """output, logsumexp and the three gradients, by PyTorch"""
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    energy = scale * leaves[0].transpose(1, 2) @ leaves[1]
    output = leaves[2] @ energy.softmax(2).transpose(1, 2)
    return output.detach(), energy.logsumexp(2).detach(), *torch.autograd.grad(output, leaves, grad_output)


def exact(query, key, value, grad_output, scale=1.0):
    """The same in float64"""
    return eager(*(t.double() for t in (query, key, value, grad_output)), scale)


def run(query, key, value, grad_output, scale=1.0):
    output, logsumexp, *lows = OPERATORS.position_attention(query, key, value, scale, True)
    lows = [t if t.shape[1] > 0 else None for t in lows]
    return (
        output,
        logsumexp,
        *OPERATORS.position_attention_backward(
            grad_output, query, key, value, output, logsumexp, scale, *lows, keys_complete=True
        ),
    )


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def assert_close(tensors, tolerance, scale=1.0):
    for got, expected in zip(run(*tensors, scale), exact(*tensors, scale), strict=True):
        assert relative_error(got, expected) < tolerance


def launches(emulator, name):
    return [r for r in emulator.report() if name in r["kernel"]]


def kernels(emulator):
    return [r["kernel"] for r in emulator.report()]


def position_sum(kernel):
    """The sum that an instance of weighted_sum_kernel or simt_sum_kernel computes."""
    (value,) = re.findall(r"\(segattn::cuda::PositionSum\)(\d)", kernel)
    return int(value)


# ---- work ------------------------------------------------------------------------------------------------------------


def blocks(positions, size):
    return math.ceil(positions / size)


def test_forward_work(emulator):
    """mma FLOPs at 97 x 97, C = 512, extrapolated from two blocks of 128 queries and ten steps of 32 keys: at most 15%
    more than the products need."""
    emulator.set_device(90, 1)  # one multiprocessor: no splits
    query, key, value, _ = inputs(1, 64, 512, 256, 320, torch.bfloat16)
    OPERATORS.position_attention(query, key, value, 1.0)
    (launch,) = launches(emulator, "weighted_sum_kernel")
    whole = launch["mma_flops"] / (2 * 10) * blocks(N97, 128) * blocks(N97, 32)
    needed = 2 * N97**2 * (64 + 512)
    assert needed <= whole <= 1.15 * needed


def test_backward_work(emulator):
    """The same for the backward pass, from 2 x 2 tiles of 128 x 128 and, for grad_value, two blocks of eight steps: at
    most 40% more."""
    emulator.set_device(90, 1)
    run(*inputs(1, 64, 512, 256, 256, torch.bfloat16))
    _, value_gradient = launches(emulator, "weighted_sum_kernel")
    assert position_sum(value_gradient["kernel"]) == VALUE_GRADIENT
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


def test_forward_traffic(traced):
    """A block reads its queries once, all keys and 256 value channels. At 97 x 97, C = 512, the 148 blocks of a sample
    read 0.9 GB, mostly from L2; any kernel must move 22 MB."""
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
    assert 0.85e9 < whole < 0.95e9 and 21e6 < minimum < 22e6  # the figures above and in docs/results.md


def test_backward_traffic(traced):
    traced.set_device(90, 1)
    run(*inputs(1, 64, 512, 256, 256, torch.bfloat16))
    (launch,) = launches(traced, "query_key_gradient_kernel")
    values, keys, queries = 2 * 512 * 128, 2 * 64 * 128, 2 * (512 + 64) * 128
    tiles = 4 * (values + keys) + 2 * queries  # query and grad_output once for two tiles
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
    """64 queries occupy one of 132 multiprocessors, so the keys are split; the merge computes the whole logsumexp."""
    tensors = inputs(1, 16, 40, 64, 1100, torch.float16)
    assert_close(tensors, 2e-3)
    assert len(launches(emulator, "merge_splits_kernel")) == 1
    emulator.set_device(90, 1)
    emulator.reset()
    assert_close(tensors, 2e-3)
    assert not launches(emulator, "merge_splits_kernel")


def test_split_queries(emulator):
    """grad_value of 64 keys: the queries are split and the partials summed."""
    tensors = inputs(1, 16, 40, 1100, 64, torch.float16)
    assert_close(tensors, 2e-3)
    (merge,) = launches(emulator, "merge_splits_kernel")
    assert position_sum(merge["kernel"]) == VALUE_GRADIENT
    emulator.set_device(90, 1)
    emulator.reset()
    assert_close(tensors, 2e-3)
    assert not launches(emulator, "merge_splits_kernel")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_whole_and_split_tiles(emulator, dtype):
    """On five multiprocessors, bfloat16: two samples of seven query blocks, ten whole tiles and four whose keys are
    split; two of six key blocks, ten whole tiles and two whose queries are split."""
    emulator.set_device(90, 5)
    tensors = inputs(2, 16, 40, 800, 700, dtype)
    assert_close(tensors, 2e-2 if dtype == torch.bfloat16 else 2e-6, scale=0.25)
    grids = [launch["grid"][0] for launch in launches(emulator, "weighted_sum_kernel")]
    if dtype == torch.bfloat16:
        assert grids[0] == grids[2] == 10 and grids[1] % 4 == 0 and grids[3] % 2 == 0
    assert len(launches(emulator, "merge_splits_kernel")) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_gradients_that_do_not_stay_in_registers(emulator, dtype):
    """E > 64 on one multiprocessor: the block processes several key blocks and query blocks, and accumulates both
    gradients in global memory."""
    emulator.set_device(90, 1)
    assert_close(inputs(1, 100, 24, 130, 200, dtype), 2e-2 if dtype == torch.bfloat16 else 2e-6, scale=0.1)
    (launch,) = launches(emulator, "query_key_gradient_kernel")
    assert launch["grid"][0] == 1


@pytest.mark.parametrize(
    ("architecture", "channels", "resident"),
    [(90, 97, True), (90, 96, False), (90, 512, True), (90, 513, False), (80, 250, True), (80, 257, False)],
)
def test_resident_grad_output(emulator, architecture, channels, resident):
    """grad_output of a query block stays in shared memory if its channels fit and fill the ring of four stages. On one
    multiprocessor, the block replaces it twice."""
    emulator.set_device(architecture, 1)
    assert_close(inputs(1, 40, channels, 300, 140, torch.bfloat16), 2e-2, scale=0.2)
    (launch,) = launches(emulator, "query_key_gradient_kernel")
    assert launch["grid"][0] == 1 and ("GradOutput)1" in launch["kernel"]) == resident


def test_split_keys_with_energies_far_apart(emulator):
    """The maxima of the splits differ by hundreds: the smaller ones get factors of 0, and nothing overflows."""
    query, key, value, grad_output = inputs(1, 8, 24, 64, 600, torch.bfloat16)
    key[:, :, 450:] *= 60
    assert_close([query, key, value, grad_output], 2e-2)
    assert launches(emulator, "merge_splits_kernel")


def test_only_unaligned_rows_are_packed(emulator):
    """Rows of 97 elements do not start on 16 bytes, rows of 96 do. Packed rows give the same bits."""
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
    ("architecture", "key_channels", "channels", "expected"),
    [
        (90, 64, 512, {"Mma16"}),
        (90, 16, 40, {"Mma16"}),
        (86, 64, 136, {"Mma16"}),  # two stages
        (90, 80, 136, {"Mma16"}),
        (86, 200, 136, {"Mma16"}),
        (86, 300, 24, {"simt"}),  # does not fit in 99 KB
        (75, 40, 24, {"simt"}),  # before sm_80: no m16n8k16
        (80, 512, 24, {"Mma16"}),
    ],
)
def test_every_device_and_channel_count_has_a_kernel(emulator, architecture, key_channels, channels, expected):
    emulator.set_device(architecture)
    tensors = inputs(1, key_channels, channels, 70, 90, torch.float16)
    assert_close(tensors, 3e-3, scale=key_channels**-0.5)
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
def test_largest_key_channels_on_tensor_cores(emulator, dtype, architecture, forward, backward):
    """The bounds that docs/limits.md and docs/decisions.md state. grad_value has the bound of the forward pass."""
    emulator.set_device(architecture)
    emulator.set_blocks_at_ends(0)
    for key_channels in (backward, backward + 1, forward, forward + 1):
        tensors = inputs(1, key_channels, 8, 70, 90, dtype)
        emulator.reset()
        run(*tensors)
        simt = {position_sum(launch["kernel"]) for launch in launches(emulator, "simt_sum_kernel")}
        expected = set()
        if key_channels > forward:
            expected |= {FORWARD, VALUE_GRADIENT}
        if key_channels > backward:
            expected |= {QUERY_GRADIENT, KEY_GRADIENT}
            if dtype == torch.float32:
                expected -= {QUERY_GRADIENT}
                expected |= {CORRECTED_QUERY_GRADIENT, FORWARD}  # the latter computes mean_key
        assert simt == expected, key_channels


@pytest.mark.parametrize("key_channels", [64, 100])
@pytest.mark.parametrize("channels", [16, 200])
def test_float32_precision(emulator, channels, key_channels):
    """3xTF32 has float32's accuracy. TF32 is 2,000 times coarser and used only if allowed."""
    tensors = inputs(1, key_channels, channels, 150, 140, torch.float32)
    scale = key_channels**-0.5
    errors = [relative_error(a, b) for a, b in zip(run(*tensors, scale), exact(*tensors, scale), strict=True)]
    assert max(errors) < 2e-6
    OPERATORS._set_allow_tf32(True)
    errors = [relative_error(a, b) for a, b in zip(run(*tensors, scale), exact(*tensors, scale), strict=True)]
    assert 5e-5 < max(errors) < 5e-3


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(64, N97), (N97, 64)])
def test_float32_sums_over_all_positions(emulator, architecture, positive, queries, keys):
    """output and grad_query of 97 x 97 keys, grad_value and grad_key of 97 x 97 queries: one block sums 9,409 products.
    In a single accumulator, the truncation of tensor cores would lose 1e-4."""
    emulator.set_device(architecture, 1)
    tensors = inputs(1, 16, 16, queries, keys, torch.float32)
    if positive:
        tensors = [t.relu() for t in tensors]
    results = zip(run(*tensors, 0.25), eager(*tensors, 0.25), exact(*tensors, 0.25), strict=True)
    for name, (got, by_eager, in_float64) in zip(RESULTS, results, strict=True):
        assert_as_exact_as_eager(name, got, by_eager, in_float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_sums_over_all_positions(emulator, dtype):
    """The same for 16-bit types, in a single accumulator: truncation loses less than rounding the results."""
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
    """delta of an output that tensor cores sum over 97 x 97 keys. bfloat16 is as exact as eager. In float16 the
    truncation is as large as the rounding error that output_low corrects, so only part of the error disappears
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
            output, logsumexp, *_ = OPERATORS.position_attention(*tensors[:3], 1.0)
            without = OPERATORS.position_attention_backward(grad_output, *tensors[:3], output, logsumexp, 1.0)[0]
            assert relative_error(got, in_float64) < 0.6 * relative_error(without, in_float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 2e-6)], ids=str)
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scales_of_any_sign(emulator, scale, dtype, tolerance):
    """The maximum is taken of q.k, before its multiplication by |scale|. A last tile with an edge: masked energies
    stay -inf at a scale of 0, and a maximum of 0 from the padding would be wrong at any."""
    tensors = inputs(1, 24, 40, 33, 45, dtype)
    for name, got, expected in zip(RESULTS, run(*tensors, scale), exact(*tensors, scale), strict=True):
        assert (got.double() - expected).norm() <= tolerance * expected.norm(), name


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, -1])
def test_nan_survives_the_rounding_to_tf32(emulator, bits, tf32):
    """Rounding adds half a unit to the bits of a number, which makes 0x7FFFFFFF, a GPU's NaN, -0."""
    OPERATORS._set_allow_tf32(tf32)
    for operand in range(3):
        tensors = inputs(1, 8, 16, 33, 33, torch.float32)[:3]
        tensors[operand].view(torch.int32)[0, 3, 5] = bits
        output = OPERATORS.position_attention(*tensors, 1.0)[0]
        affected = (output[0, :, 5], output[0], output[0, 3])[operand]  # a query, all queries, a channel
        assert not affected.isfinite().any()


@pytest.mark.parametrize("queries", [33, 128, 130])
@pytest.mark.parametrize("precision", ["float16", "bfloat16", "tf32"])
def test_keys_of_minus_infinity(emulator, precision, queries):
    """Energies of -inf: weights of 0 and gradients of 0, also where a tile extends past the last query. Queries are 0
    there, and 0 times -inf is NaN. (3xTF32 makes every product with an infinity NaN.)"""
    OPERATORS._set_allow_tf32(precision == "tf32")
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    query, key, value, grad_output = inputs(1, 8, 24, queries, 150, dtype)
    query = query.abs() + 0.25
    dropped, kept = [3, 90, 149], [i for i in range(150) if i not in (3, 90, 149)]
    key[:, :, dropped] = -math.inf
    output, logsumexp, _, grad_key, grad_value = run(query, key, value, grad_output)
    expected = exact(query, key[:, :, kept], value[:, :, kept], grad_output)
    got = output, logsumexp, grad_key[:, :, kept], grad_value[:, :, kept]
    for ours, theirs in zip(got, (*expected[:2], *expected[3:]), strict=True):
        assert relative_error(ours, theirs) < 2e-2
    assert not grad_key[:, :, dropped].any() and not grad_value[:, :, dropped].any()


def rounded_to_tf32(t):
    bits = t.float().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).double()


def tf32_key_gradient(query, key, value, grad_output):
    """grad_key as eager PyTorch computes it with TF32 products: operands rounded, delta summed from the same dP."""
    query, key, value, grad_output = map(rounded_to_tf32, (query, key, value, grad_output))
    weights = (query.transpose(1, 2) @ key).softmax(2)
    weight_gradients = grad_output.transpose(1, 2) @ value
    delta = (weights * weight_gradients).sum(2, keepdim=True)
    return query @ rounded_to_tf32(weights * (weight_gradients - delta))


def test_tf32_key_gradient_with_the_delta_of_its_products(emulator):
    """In a row with one large weight dP - delta cancels, and so must their rounding errors. With a delta of unrounded
    operands, the error of grad_key was 1.12 times eager's, and its largest element up to 1.5 times."""
    OPERATORS._set_allow_tf32(True)
    errors = []
    for seed in range(4):
        tensors = inputs(1, 24, 200, 97, 97, torch.float32, seed)
        in_float64 = exact(*tensors)[3]
        errors.append([relative_error(got, in_float64) for got in (run(*tensors)[3], tf32_key_gradient(*tensors))])
    got, by_eager = torch.tensor(errors).mean(0).tolist()
    assert got < 1.05 * by_eager, errors


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
    """Two samples 2^31 elements apart; the memory between them is never touched."""
    if os.environ.get("SEGATTN_EMULATOR_VARIANT") == "asan":
        pytest.skip("the sanitizer's shadow memory would touch it")
    key_channels, channels, positions = 8, 16, 64
    tensors = inputs(2, key_channels, channels, positions, positions, torch.bfloat16)
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


# ---- sanitizer builds ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_race_build(emulator):
    """Shared-memory races fail; memory accesses are counted. Without the tests of accuracy over many positions, which
    run the same code for longer."""
    run_in("race", __file__, "not build and not float64 and not sums_over and not regions and not float32_precision")


@pytest.mark.slow
def test_asan_build(emulator):
    run_in("asan", __file__, "split or packed or has_a_kernel or precision")
