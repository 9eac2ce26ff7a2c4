"""The CUDA kernels of criss-cross attention, emulated: what the operator suite cannot see. Work and traffic against the
arithmetic of docs/results.md, the paths a problem or a device chooses, and the builds that look for faults."""

import functools
import math
import os
import re

import pytest
import torch

from segattn_ops import reference

from ..emulated import assert_same_bits, conflicts, global_bytes, run_in
from ..tolerance import assert_as_exact_as_eager

OPERATORS = torch.ops.segattn_emulated
RESULTS = ("output", "logsumexp", "grad_query", "grad_key", "grad_value")
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


def eager(query, key, value, grad_output, scale=0.5):
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    output, logsumexp = reference.criss_cross_attention(*leaves, scale)
    gradients = torch.autograd.grad(output, leaves, grad_output)
    return output.detach(), logsumexp.detach(), *gradients


def exact(query, key, value, grad_output, scale=0.5):
    return eager(*(t.double() for t in (query, key, value, grad_output)), scale)


def worst_error(tensors):
    pairs = zip(run(*tensors), exact(*tensors), strict=True)
    return max(((got.double() - want).norm() / want.norm()).item() for got, want in pairs)


def kernels(emulator):
    return {r["kernel"] for r in emulator.report()}


def launched(emulator):
    """Names without namespace and template arguments"""
    return [re.search(r"\w+_kernel", r["kernel"])[0] for r in emulator.report()]


def total(emulator, what):
    return sum(what(launch) for launch in emulator.report())


# ---- work and traffic ------------------------------------------------------------------------------------------------


def launch_both(emulator, embedding, channels, backward, side=SIDE):
    """One pass over a square, alone on one multiprocessor: no work is done twice to fill others."""
    emulator.set_device(90, 1)
    query, key, value, grad_output = inputs(embedding, channels, side, side, torch.bfloat16)
    emulator.reset()
    if backward:
        logsumexp = torch.zeros(1, side, side)
        OPERATORS.criss_cross_attention_backward(grad_output, query, key, value, value, logsumexp, 1.0)
    else:
        OPERATORS.criss_cross_attention(query, key, value, 1.0)


def forward_work(embedding, channels):
    """Lines of 97 are computed as 112, and the 97 of them as 98 (pairs of rows) and 104 (strips of 8 columns)."""
    return 2 * (98 + 104) * 112**2 * (embedding + channels)


def backward_work(embedding, channels):
    """Weights and the mean key; weights again, their gradient, and three sums. Sums take 32 channels at a time."""
    return 2 * (98 + 104) * 112**2 * (2 * embedding + 3 * math.ceil(embedding / 32) * 32 + 2 * channels)


@pytest.mark.parametrize(("work", "backward", "products"), [(forward_work, 0, (1, 1)), (backward_work, 1, (5, 2))])
def test_work(emulator, work, backward, products):
    launch_both(emulator, 16, 32, backward)
    assert total(emulator, lambda launch: launch["mma_flops"]) == work(16, 32)
    assert work(64, 512) <= 1.41 * 2 * PAIRS * (products[0] * 64 + products[1] * 512)


@functools.cache
def once(side, run, item=2):
    """Bytes of one access to every element of a side x side map, asked for and in 32-byte sectors, when an instruction
    takes `run` elements of a row. A mean over 16 maps, one behind the other: a map starts anywhere in a sector."""
    starts = [(first, x) for first in range(0, 16 * side * side, side) for x in range(0, side, run)]
    pieces = [(item * (first + x), item * (first + min(x + run, side)) - 1) for first, x in starts]
    return item * side * side, sum(32 * (last // 32 - first // 32 + 1) for first, last in pieces) / 16


# elements of a row that one instruction takes: a strip's, a warp's, a tile's, all
STRIP, WARP, TILE, ROW = 8, 32, 64, 128


def forward_accesses(embedding, channels):
    """How often each kind of access goes over so many channels, sides of 65 to 128. Columns take query and key once for
    each of their two tiles, rows, in one tile, once; the values are read once by either; columns write their result,
    rows read it and write the sum."""
    return {
        "columns": [(STRIP, embedding, 2 * 2), (STRIP, channels, 1 + 1)],
        "rows": [(WARP, embedding, 2), (WARP, channels, 1), (ROW, channels, 1 + 1)],
    }


def backward_accesses(embedding, channels):
    """The mean key takes query and key twice for the weights, in tiles of 64 in either direction, and key once more.
    Columns take query and key twice for the weights and once for their gradients; grad_output once for the value
    gradient, twice with the values for the energies' gradient. Rows take query and key twice, grad_output and value
    once. Columns write the mean key and the gradients, rows read them and write the sums."""
    return {
        "mean key, columns": [(STRIP, embedding, 2 * 2 + 1 + 1)],
        "columns": [(STRIP, embedding, 2 * (2 + 1) + 2), (STRIP, channels, 1 + 2 + 2 + 1)],
        "mean key, rows": [(WARP, embedding, 2 * 2 + 1), (TILE, embedding, 2)],
        "rows": [(WARP, embedding, 2 * 2), (WARP, channels, 2), (ROW, embedding, 2 * 2), (ROW, channels, 2)],
    }


def scalar_traffic(backward, side):
    """logsumexp and delta, by launch: bytes, bytes of sectors. Forward: columns write, rows read and write, a thread a
    query. Backward: the four threads of a query read both, columns once for each of two tiles of keys; for the mean key
    they read logsumexp, once a tile in either direction. One of the four writes the sum of the energies' gradients in
    columns and adds to it in rows."""
    positions, row = side * side, sectors_of_scalars(side)
    if backward:
        return {
            "mean key, columns": (32 * positions, 2 * 32 * positions),
            "columns": ((64 + 4) * positions, (2 * 2 + 1) * 32 * positions),
            "mean key, rows": (32 * positions, 2 * row),
            "rows": ((32 + 2 * 4) * positions, (2 + 2) * row),
        }
    return {"columns": (4 * positions, 32 * positions), "rows": (8 * positions, 2 * row)}


def sectors_of_scalars(side):
    """A row's float32 numbers, eight at a time."""
    pieces = [(y * side + x, y * side + min(x + 8, side) - 1) for y in range(side) for x in range(0, side, 8)]
    return sum(32 * (4 * last // 32 - 4 * first // 32 + 1) for first, last in pieces)


@pytest.mark.parametrize("side", [SIDE, 96])
@pytest.mark.parametrize(("accesses", "backward"), [(forward_accesses, False), (backward_accesses, True)])
def test_traffic(traced, accesses, backward, side):
    """Bytes and sectors of every line kernel, exactly, where rows start anywhere and where they start on 32 bytes."""
    launch_both(traced, 16, 32, backward, side)
    launches = [r for r in traced.report() if "line_" in r["kernel"]]
    scalars = scalar_traffic(backward, side)
    for launch, (direction, kinds) in zip(launches, accesses(16, 32).items(), strict=True):
        for unit in (0, 1):
            features = sum(times * channels * once(side, run)[unit] for run, channels, times in kinds)
            counted = sum(global_bytes(launch, sectors=bool(unit)).values())
            assert counted == features + scalars[direction][unit], (direction, unit)


@pytest.mark.parametrize(
    ("accesses", "others", "least", "ratios"),
    [
        (forward_accesses, 0, 2 * 64 + 2 * 512, (2.56, 5.27)),
        (backward_accesses, 2 * 512 + 3 * 64, 4 * 64 + 4 * 512, (3.56, 7.55)),
    ],
)
def test_documented_traffic(accesses, others, least, ratios):
    """What docs/results.md says of C = 512, E = 64 at 97 x 97, in units of the least. delta_kernel takes two maps
    of C channels, the correction of grad_query three of E."""
    for unit in (0, 1):
        kinds = [kind for direction in accesses(64, 512).values() for kind in direction]
        counted = sum(times * channels * once(SIDE, run)[unit] for run, channels, times in kinds)
        assert abs((counted / (2 * SIDE**2) + others) / least - ratios[unit]) < 0.01


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
    grids = [r["grid"] for r in emulator.report() if "line_attention" in r["kernel"]]
    assert grids[0][0] == 3 * 8 and grids[1][0] == 3 * 8  # blocks of lines, groups of 32 channels
    assert worst_error(tensors) < TOLERANCE[torch.float16]


def test_forward_in_one_kernel_a_direction_where_the_weights_fit(emulator):
    emulator.set_device(86)
    OPERATORS.criss_cross_attention(*inputs(4, 6, 3, 97, torch.bfloat16)[:3], 1.0)
    assert launched(emulator) == ["line_attention_kernel"] * 2
    emulator.reset()
    OPERATORS.criss_cross_attention(*inputs(4, 6, 3, 1700, torch.bfloat16)[:3], 1.0)
    names = launched(emulator)
    assert names == ["line_statistics_kernel"] * 2 + ["line_sum_kernel"] * 2
    emulator.reset()
    OPERATORS.criss_cross_attention(*inputs(4, 6, 1, 97, torch.bfloat16)[:3], 1.0)
    assert len(emulator.report()) == 1  # no columns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_later_keys_weigh_most(emulator, dtype):
    """Each tile of a column's keys has higher scores than those before: their weights are lowered again. And the other
    way round."""
    for height, rise in ((150, 0.2), (150, -0.2), (70, 2.0)):
        query, key, value, grad_output = inputs(4, 6, height, 5, dtype)
        query, key = query.abs(), key.abs() * 0.1
        key = key + rise * torch.arange(height).div(10, rounding_mode="floor").to(dtype)[:, None]
        output, logsumexp = OPERATORS.criss_cross_attention(query, key, value, 0.5)
        want_output, want_logsumexp, *_ = exact(query, key, value, grad_output)
        assert (output.double() - want_output).norm() < 2 * TOLERANCE[dtype] * want_output.norm()
        assert (logsumexp.double() - want_logsumexp).norm() < 1e-6 * want_logsumexp.norm()


@pytest.mark.parametrize("shape", [(9, 70), (70, 9), (12, 66)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_layout(emulator, dtype, shape):
    tensors = inputs(6, 40, *shape, dtype, batch=2)
    expected = run(*tensors)
    transposed = [t.mT.contiguous().mT for t in tensors]
    channels_last = [t.to(memory_format=torch.channels_last) for t in tensors]
    cut = [torch.nn.functional.pad(t, (1, 2, 0, 1))[:, :, : shape[0], 1 : 1 + shape[1]] for t in tensors]
    for layout in (transposed, channels_last, cut):
        for got, want in zip(run(*layout), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("channels", "height", "width"), [(512, 2, 97), (16, 1, 600)])
def test_float32_sums(emulator, architecture, channels, height, width):
    """Sums over DANet's channels, and over a line so long that tensor cores, which cut their sums off, lose too much of
    it in one accumulator. Values are features after a ReLU."""
    emulator.set_device(architecture)
    query, key, value, grad_output = inputs(8, channels, height, width, torch.float32)
    tensors = (query, key, value.relu(), grad_output)
    results = zip(run(*tensors), eager(*tensors), exact(*tensors), strict=True)
    for name, (got, by_eager, in_float64) in zip(RESULTS, results, strict=True):
        assert_as_exact_as_eager(name, got, by_eager, in_float64)


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
    run_in("race", __file__, "traffic or conflicts or long_lines or gradients or same_bits or later_keys")


def test_asan_build(emulator):
    run_in("asan", __file__, "every_device or long_lines or gradients or any_layout")
