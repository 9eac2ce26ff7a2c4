"""The CUDA kernels of criss-cross attention, emulated: what the operator suite cannot see. Work and traffic against the
arithmetic of docs/performance.md, the paths a problem or a device chooses, and the builds that look for faults."""

import math
import os

import pytest
import torch

from segattn_ops import reference

from .emulated import assert_same_bits, conflicts, global_bytes, run_in

OPERATORS = torch.ops.segattn_emulated
SIDE = 97
PAIRS = SIDE * SIDE * (2 * SIDE - 1)  # of a query and a position it sees, at 97 x 97


def inputs(embedding, channels, height, width, dtype, batch=1, seed=0):
    """query, key, value and grad_output"""
    generator = torch.Generator().manual_seed(seed)
    sizes = (embedding, embedding, channels, channels)
    return [torch.randn((batch, c, height, width), generator=generator).to(dtype) for c in sizes]


def run(query, key, value, grad_output, scale=0.5):
    """output, logsumexp and the three gradients"""
    output, logsumexp = OPERATORS.criss_cross_attention(query, key, value, scale)
    return (
        output,
        logsumexp,
        *OPERATORS.criss_cross_attention_backward(grad_output, query, key, value, output, logsumexp, scale),
    )


def exact(query, key, value, grad_output, scale=0.5):
    leaves = [t.double().requires_grad_() for t in (query, key, value)]
    output, logsumexp = reference.criss_cross_attention(*leaves, scale)
    gradients = torch.autograd.grad(output, leaves, grad_output.double())
    return output.detach(), logsumexp.detach(), *gradients


def worst_error(tensors):
    pairs = zip(run(*tensors), exact(*tensors), strict=True)
    return max(((got.double() - want).norm() / want.norm()).item() for got, want in pairs)


def kernels(emulator):
    return {r["kernel"] for r in emulator.report()}


def total(emulator, what):
    return sum(what(launch) for launch in emulator.report())


# ---- work and traffic ------------------------------------------------------------------------------------------------


def launch_both(emulator, embedding, channels, backward):
    """One pass at 97 x 97, alone on one multiprocessor: no work is done twice to fill others."""
    emulator.set_device(90, 1)
    query, key, value, grad_output = inputs(embedding, channels, SIDE, SIDE, torch.bfloat16)
    emulator.reset()
    if backward:
        logsumexp = torch.zeros(1, SIDE, SIDE)
        OPERATORS.criss_cross_attention_backward(grad_output, query, key, value, value, logsumexp, 1.0)
    else:
        OPERATORS.criss_cross_attention(query, key, value, 1.0)


def forward_work(embedding, channels):
    """Lines of 97 are computed as 112, and the 97 of them as 98 (pairs of rows) and 104 (strips of 8 columns); weights
    twice, for the statistics and for the sum."""
    return 2 * (98 + 104) * 112**2 * (2 * embedding + channels)


def backward_work(embedding, channels):
    """Weights, their gradient, and three sums over 32 channels at a time."""
    return 2 * (98 + 104) * 112**2 * (embedding + 2 * math.ceil(embedding / 32) * 32 + 2 * channels)


@pytest.mark.parametrize(("work", "backward", "products"), [(forward_work, 0, (1, 1)), (backward_work, 1, (3, 2))])
def test_work(emulator, work, backward, products):
    launch_both(emulator, 16, 32, backward)
    assert total(emulator, lambda launch: launch["mma_flops"]) == work(16, 32)
    assert work(64, 512) <= 1.7 * 2 * PAIRS * (products[0] * 64 + products[1] * 512)


MAP = SIDE * SIDE * 2  # bytes of one channel


def forward_traffic(embedding, channels):
    """Statistics and weights of rows and columns take query and key twice each (lines of 97 are two tiles); the values
    are read once for the rows and once for the columns, the rows' result is written, read and written again."""
    return (4 * 2 * 2 * embedding + (2 + 3) * channels) * MAP


def backward_traffic(embedding, channels):
    """Rows and columns each take query and key twice for the weights, once more for their gradients; grad_output once
    for the value gradient, twice with the values (two tiles) for the energies' gradient. Columns add to what rows
    wrote. Delta takes grad_output and output."""
    lines = 2 * ((2 + 1) * 2 * embedding + (1 + 2 + 2) * channels)
    return (lines + 3 * (2 * embedding + channels) + 2 * channels) * MAP


@pytest.mark.parametrize(
    ("traffic", "backward", "least", "ratio"),
    [(forward_traffic, False, 2 * 64 + 2 * 512, 3.1), (backward_traffic, True, 4 * 64 + 4 * 512, 3.8)],
)
def test_traffic(traced, traffic, backward, least, ratio):
    launch_both(traced, 16, 32, backward)
    counted = total(traced, lambda launch: sum(global_bytes(launch, sectors=False).values()))
    scalars = 4 * 40 * SIDE * SIDE  # logsumexp and delta, read by whoever makes weights
    assert traffic(16, 32) <= counted <= traffic(16, 32) + scalars
    assert abs(traffic(64, 512) / (least * MAP) - ratio) < 0.1  # what docs/performance.md says


def test_whole_sectors(traced):
    """Where rows start on 32 bytes, strips of 8 columns are a whole sector of float32, and half a one of a 16-bit type,
    whose results are written, besides, line by line (docs/performance.md says why)."""
    for dtype, share in ((torch.float32, 0.9), (torch.bfloat16, 0.33)):
        OPERATORS._set_allow_tf32(True)  # strips of 8 columns in float32, too
        traced.reset()
        query, key, value, _ = inputs(16, 32, 32, 32, dtype)
        OPERATORS.criss_cross_attention(query, key, value, 1.0)
        columns = [r for r in traced.report() if "line_sum" in r["kernel"]][1]
        bytes_, sectors = (sum(global_bytes(columns, sectors=s).values()) for s in (False, True))
        assert bytes_ >= share * sectors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bank_conflicts(traced, dtype):
    OPERATORS._set_allow_tf32(True)
    run(*inputs(16, 32, 20, 97, dtype))
    limit = 1.1 if dtype == torch.bfloat16 else 1.3  # TF32: the keys' weights, two rows of one bank
    for launch in traced.report():
        if "line_" in launch["kernel"]:
            assert conflicts(launch) <= limit, launch["kernel"]


# ---- paths -----------------------------------------------------------------------------------------------------------

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("architecture", [75, 80, 86, 90])
def test_every_device(emulator, architecture, dtype):
    """Before sm_80 every type takes fused multiply-adds; the blocks fit each device's shared memory."""
    emulator.set_device(architecture)
    assert worst_error(inputs(12, 40, 9, 70, dtype)) < TOLERANCE[dtype]
    simt = architecture < 80 or dtype == torch.float64
    assert all(("LineSimt" in k) == simt for k in kernels(emulator) if "line_" in k)


@pytest.mark.parametrize(
    ("architecture", "dtype", "height", "width"),
    [
        (90, torch.bfloat16, 3, 300),  # longer than a block's owned positions
        (86, torch.float16, 260, 2),
        (86, torch.bfloat16, 2, 1700),  # no room for all weights: parts
        (75, torch.float64, 2, 400),
        (75, torch.float32, 500, 2),
    ],
)
def test_long_lines(emulator, architecture, dtype, height, width):
    emulator.set_device(architecture)
    assert worst_error(inputs(4, 6, height, width, dtype)) < TOLERANCE[dtype]


def test_gradients_in_one_kernel_where_the_weights_fit(emulator):
    run(*inputs(8, 16, 20, 97, torch.bfloat16))
    assert any("line_backward" in k for k in kernels(emulator))
    emulator.reset()
    run(*inputs(8, 16, 3, 129, torch.bfloat16))
    names = kernels(emulator)
    assert any("line_backward" in k for k in names)  # the columns, of three positions
    assert any("line_sum_kernel" in k for k in names)  # the rows


def test_channels_are_shared_out_where_lines_are_few(emulator):
    tensors = inputs(8, 256, 5, 20, torch.float16)
    OPERATORS.criss_cross_attention(*tensors[:3], 1.0)
    grids = [r["grid"] for r in emulator.report() if "line_sum" in r["kernel"]]
    assert grids[0][0] == 3 * 8 and grids[1][0] == 3 * 8  # blocks of lines, groups of 32 channels
    assert worst_error(tensors) < TOLERANCE[torch.float16]


def test_tf32_only_on_permission(emulator):
    tensors = inputs(16, 24, 9, 21, torch.float32)
    assert worst_error(tensors) < 3e-6
    OPERATORS._set_allow_tf32(True)
    assert 3e-5 < worst_error(tensors) < 5e-3


def test_large_logits(emulator):
    query, key, value, grad_output = inputs(16, 24, 12, 40, torch.bfloat16)
    assert all(torch.isfinite(t).all() for t in run(100 * query, key, value, grad_output))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_any_schedule_gives_the_same_bits(emulator, dtype):
    tensors = inputs(8, 40, 9, 70, dtype)
    assert_same_bits(emulator, lambda: run(*tensors))


def test_offsets_beyond_int32(emulator):
    """Two samples 2^31 elements apart in memory nobody touches in between."""
    if os.environ.get("SEGATTN_EMULATOR_VARIANT") == "asan":
        pytest.skip("the sanitizer's shadow would touch it")
    tensors = inputs(8, 16, 6, 10, torch.bfloat16, batch=2)
    far = []
    for t in tensors[:3]:
        view = torch.empty(2**31 + t[0].numel(), dtype=t.dtype).as_strided(t.shape, (2**31, *t.stride()[1:]))
        far.append(view.copy_(t))
    for a, b in zip(run(*tensors), run(*far, tensors[3]), strict=True):
        assert torch.equal(a, b)


def test_float64_gradients(emulator):
    leaves = [t.requires_grad_() for t in inputs(3, 5, 4, 7, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *t: OPERATORS.criss_cross_attention(*t, 0.7)[0], leaves, fast_mode=True)


# ---- builds that look for faults -------------------------------------------------------------------------------------


def test_race_build(emulator):
    """Shared-memory races fail; memory accesses are counted."""
    run_in("race", __file__, "traffic or sectors or conflicts or long_lines or gradients or same_bits")


def test_asan_build(emulator):
    run_in("asan", __file__, "every_device or long_lines or gradients")
