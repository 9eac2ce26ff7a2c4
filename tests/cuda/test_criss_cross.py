"""The CUDA kernels of criss-cross attention, emulated: properties that the operator suite does not cover.

Work and traffic against the arithmetic of docs/results.md, the kernels chosen for a shape and a device, and the
race and address-sanitizer builds."""

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
PAIRS = SIDE * SIDE * (2 * SIDE - 1)  # pairs of a query and a position it attends to, at 97 x 97


def inputs(key_channels, value_channels, height, width, dtype, batch=1, seed=0):
    """Random query, key, value and grad_output."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (key_channels, key_channels, value_channels, value_channels)
    return [torch.randn((batch, c, height, width), generator=generator).to(dtype) for c in sizes]


def run(query, key, value, grad_output, scale=0.5):
    """output, logsumexp and the three gradients of the kernels."""
    output, logsumexp, low = OPERATORS.criss_cross_attention(query, key, value, scale)
    return (
        output,
        logsumexp,
        *OPERATORS.criss_cross_attention_backward(
            grad_output, query, key, value, output, logsumexp, scale, low, keys_complete=True
        ),
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
    """The kernels' names without namespace and template arguments, in launch order."""
    return [re.search(r"\w+_kernel", r["kernel"])[0] for r in emulator.report()]


def total(emulator, what):
    return sum(what(launch) for launch in emulator.report())


# ---- work and traffic ------------------------------------------------------------------------------------------------


def launch_both_directions(emulator, key_channels, value_channels, backward, side=SIDE):
    """One pass over a square image on one multiprocessor, where no work is repeated to occupy more of them."""
    emulator.set_device(90, 1)
    query, key, value, grad_output = inputs(key_channels, value_channels, side, side, torch.bfloat16)
    emulator.reset()
    if backward:
        logsumexp = torch.zeros(1, side, side)
        OPERATORS.criss_cross_attention_backward(
            grad_output, query, key, value, value, logsumexp, 1.0, logsumexp, keys_complete=True
        )
    else:
        OPERATORS.criss_cross_attention(query, key, value, 1.0)


def forward_work(key_channels, value_channels):
    """mma operations. 97 positions round up to 112, 97 rows to 98 (pairs), and 97 columns to 104 (strips of 8)."""
    return 2 * (98 + 104) * 112**2 * (key_channels + value_channels)


def backward_work(key_channels, value_channels):
    """Weights twice (for the mean key and for the gradients), energy gradients, and four sums: mean key, value, query
    and key gradient. Sums of E channels are computed for a multiple of 32."""
    return 2 * (98 + 104) * 112**2 * (2 * key_channels + 3 * math.ceil(key_channels / 32) * 32 + 2 * value_channels)


@pytest.mark.parametrize(("work", "backward", "products"), [(forward_work, 0, (1, 1)), (backward_work, 1, (5, 2))])
def test_work(emulator, work, backward, products):
    launch_both_directions(emulator, 16, 32, backward)
    assert total(emulator, lambda launch: launch["mma_flops"]) == work(16, 32)
    assert work(64, 512) <= 1.41 * 2 * PAIRS * (products[0] * 64 + products[1] * 512)


# How an instruction accesses a row: the elements that it covers and their distance. Strips of columns; a warp's
# positions of a row; loads of rows, whose threads load two neighbouring positions, one after the other.
STRIP, WARP, NEIGHBOURS = (8, 1), (32, 1), (64, 2)


@functools.cache
def bytes_per_access(side, access, staged, item=2):
    """Bytes requested and bytes of 32-byte sectors for one access to every element of a side x side channel. Averaged
    over 16 consecutive channels: each starts anywhere in a sector. Loads of tiles (`staged`) repeat the last line for
    missing ones: columns in the same instruction, the missing row of a pair in one of its own."""
    (span, step), rows, lines = access, list(range(16 * side)), side
    if staged:
        lines = -(-side // (8 if access == STRIP else 2)) * (8 if access == STRIP else 2)
        rows += range(side - 1, 16 * side, side) if access == NEIGHBOURS and lines > side else []
    sectors = 0
    for row in rows:
        for x in range(0, side, span):
            for elements in (range(x + first, min(x + span, side), step) for first in range(step)):
                if elements:
                    start, last = item * (row * side + elements[0]), item * (row * side + elements[-1] + 1) - 1
                    sectors += 32 * (last // 32 - start // 32 + 1)
    return item * side * lines, sectors / 16


def bytes_of_features(side, kinds, unit):
    return sum(
        channels
        * (loads * bytes_per_access(side, access, True)[unit] + others * bytes_per_access(side, access, False)[unit])
        for access, channels, loads, others in kinds
    )


def forward_accesses(key_channels, value_channels):
    """(access, channels, loads of tiles, accesses to outputs) by launch, for sides of 65 to 128.

    Columns read query and key once for each of their two tiles; rows, in one tile, once. Both read the values once.
    Columns write their result, rows read it and write the sum."""
    return {
        "columns": [(STRIP, key_channels, 2 * 2, 0), (STRIP, value_channels, 1, 1)],
        "rows": [
            (NEIGHBOURS, key_channels, 2, 0),
            (NEIGHBOURS, value_channels, 1, 0),
            (WARP, value_channels, 0, 1 + 1),
        ],
    }


def backward_accesses(key_channels, value_channels):
    """As in forward_accesses.

    The mean key reads query and key twice for the weights, in tiles of 64 in both directions, and key once more.
    Columns read query and key twice for the weights and once for their gradients, grad_output once for the value
    gradient, and grad_output and value twice for the energy gradients. Rows read query and key twice, grad_output and
    value once. Columns write the mean key and the gradients, rows read them and write the sums."""
    return {
        "mean key, columns": [(STRIP, key_channels, 2 * 2 + 1, 1)],
        "columns": [(STRIP, key_channels, 2 * (2 + 1), 2), (STRIP, value_channels, 1 + 2 + 2, 1)],
        "mean key, rows": [(NEIGHBOURS, key_channels, 2 * 2 + 1, 0), (WARP, key_channels, 0, 2)],
        "rows": [
            (NEIGHBOURS, key_channels, 2 * 2, 0),
            (NEIGHBOURS, value_channels, 2, 0),
            (WARP, key_channels, 0, 2 * 2),
            (WARP, value_channels, 0, 2),
        ],
    }


def scalar_traffic(backward, side):
    """Bytes and bytes of sectors of logsumexp, logsumexp_low, delta and grad_sum, by launch.

    Forward: one thread per query, of two columns or 16 positions of a row at a time; columns write logsumexp and
    logsumexp_low, rows read and write them. Backward: the four threads of a query read both and delta, columns once for
    each of two tiles of keys. The mean key reads both once per tile in both directions. One thread per query writes
    grad_sum in columns and adds to it in rows, as many queries at a time as in the forward."""
    positions, row = side * side, sectors_of_scalars(side, 8)
    if backward:
        return {
            "mean key, columns": (64 * positions, 2 * 2 * 32 * positions),
            "columns": ((96 + 4) * positions, 2 * 3 * 32 * positions + sectors_of_scalars(side, 2)),
            "mean key, rows": (64 * positions, 2 * 2 * row),
            "rows": ((48 + 2 * 4) * positions, 3 * row + 2 * sectors_of_scalars(side, 16)),
        }
    return {
        "columns": (8 * positions, 2 * sectors_of_scalars(side, 2)),
        "rows": (16 * positions, 4 * sectors_of_scalars(side, 16)),
    }


def sectors_of_scalars(side, run):
    """Bytes of sectors of one float32 per position, accessed in rows of `run` at a time."""
    pieces = [(y * side + x, y * side + min(x + run, side) - 1) for y in range(side) for x in range(0, side, run)]
    return sum(32 * (4 * last // 32 - 4 * first // 32 + 1) for first, last in pieces)


@pytest.mark.parametrize("side", [SIDE, 96])
@pytest.mark.parametrize(("accesses", "backward"), [(forward_accesses, False), (backward_accesses, True)])
def test_traffic(traced, accesses, backward, side):
    """Bytes and sectors of every line kernel, exactly: rows start anywhere at side 97 and on 32 bytes at side 96."""
    launch_both_directions(traced, 16, 32, backward, side)
    launches = [r for r in traced.report() if "line_" in r["kernel"]]
    scalars = scalar_traffic(backward, side)
    for launch, (direction, kinds) in zip(launches, accesses(16, 32).items(), strict=True):
        for unit in (0, 1):
            features = bytes_of_features(side, kinds, unit)
            counted = sum(global_bytes(launch, sectors=bool(unit)).values())
            assert counted == features + scalars[direction][unit], (direction, unit)


@pytest.mark.parametrize(
    ("accesses", "others", "minimum", "ratios"),
    [
        (forward_accesses, 0, 2 * 64 + 2 * 512, (2.61, 6.23)),
        (backward_accesses, 2 * 512 + 3 * 64, 4 * 64 + 4 * 512, (3.66, 8.51)),
    ],
)
def test_documented_traffic(accesses, others, minimum, ratios):
    """The traffic in docs/results.md for C = 512, E = 64 at 97 x 97, relative to the minimum. delta_kernel accesses
    two feature maps of C channels, the correction of grad_query three of E."""
    for unit in (0, 1):
        kinds = [kind for direction in accesses(64, 512).values() for kind in direction]
        counted = bytes_of_features(SIDE, kinds, unit)
        assert abs((counted / (2 * SIDE**2) + others) / minimum - ratios[unit]) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bank_conflicts(traced, dtype):
    OPERATORS._set_allow_tf32(True)
    run(*inputs(16, 32, 20, 97, dtype))
    limit = 1.1 if dtype == torch.bfloat16 else 1.3  # TF32: load_b_keys reads two rows with the same banks
    for launch in traced.report():
        if "line_" in launch["kernel"]:
            assert conflicts(launch) <= limit, launch["kernel"]


# ---- paths -----------------------------------------------------------------------------------------------------------

TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("architecture", [75, 80, 86, 90])
def test_every_device(emulator, architecture, dtype):
    """Blocks fit the shared memory of every device. Before sm_80 every type uses fused multiply-adds."""
    emulator.set_device(architecture)
    assert worst_error(inputs(12, 40, 9, 70, dtype)) < TOLERANCE[dtype]
    simt = architecture < 80 or dtype == torch.float64
    assert all(("LineSimt" in k) == simt for k in kernels(emulator) if "line_" in k)


@pytest.mark.parametrize(
    ("architecture", "dtype", "height", "width"),
    [
        (90, torch.bfloat16, 3, 300),  # longer than the owned positions of a block
        (86, torch.float16, 260, 2),
        (86, torch.bfloat16, 2, 1700),  # all weights do not fit: several passes
        (75, torch.float64, 2, 400),
        (75, torch.float32, 500, 2),
    ],
)
def test_long_lines(emulator, architecture, dtype, height, width):
    emulator.set_device(architecture)
    assert worst_error(inputs(4, 6, height, width, dtype)) < TOLERANCE[dtype]


def test_given_weights_are_summed_in_registers(emulator):
    """A line in several passes, whose parts are large and cancel: their rounding to 16 bits would be the error."""
    emulator.set_device(86)
    _, key, _, _ = inputs(2, 2, 2, 1700, torch.bfloat16)
    key[..., :1275] += 8
    key[..., 1275:] -= 24
    grad_affinity = 1 + 0.02 * torch.randn((1, 1701, 2, 1700), generator=torch.Generator().manual_seed(1))
    grad_affinity = grad_affinity.to(torch.bfloat16)
    got, _ = OPERATORS.criss_cross_affinity_backward(grad_affinity, key, key, needs_input_grad=[True, False])
    references = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = key.to(dtype, copy=True).requires_grad_()
        affinity = reference.criss_cross_affinity(leaf, key.to(dtype))
        references += torch.autograd.grad(affinity, leaf, grad_affinity.to(dtype))
    assert_as_exact_as_eager("grad_query", got, *references)


@pytest.mark.parametrize(("height", "width"), [(3, 5), (9, 11)])
def test_missing_lines(emulator, height, width):
    """Blocks with pairs that lack one line or both. The race build reports shared memory that nobody has written."""
    assert worst_error(inputs(4, 6, height, width, torch.bfloat16)) < TOLERANCE[torch.bfloat16]


def test_gradients_in_one_kernel_where_the_weights_fit(emulator):
    run(*inputs(8, 16, 20, 97, torch.bfloat16))
    assert any("line_backward" in k for k in kernels(emulator))
    emulator.reset()
    run(*inputs(8, 16, 3, 129, torch.bfloat16))
    names = kernels(emulator)
    assert any("line_backward" in k for k in names)  # the columns, of three positions
    assert any("line_sum_kernel" in k for k in names)  # the rows


def test_channels_are_split_where_lines_are_few(emulator):
    tensors = inputs(8, 256, 5, 20, torch.float16)
    OPERATORS.criss_cross_attention(*tensors[:3], 1.0)
    grids = [r["grid"] for r in emulator.report() if "line_attention" in r["kernel"]]
    assert grids[0][0] == 3 * 8 and grids[1][0] == 3 * 8  # blocks of lines x groups of 32 channels
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
def test_energies_that_rise_or_fall_along_a_column(emulator, dtype):
    """Energies that rise from one tile of keys to the next rescale all earlier weights; falling ones rescale none."""
    for height, rise in ((150, 0.2), (150, -0.2), (70, 2.0)):
        query, key, value, grad_output = inputs(4, 6, height, 5, dtype)
        query, key = query.abs(), key.abs() * 0.1
        key = key + rise * torch.arange(height).div(10, rounding_mode="floor").to(dtype)[:, None]
        output, logsumexp, _ = OPERATORS.criss_cross_attention(query, key, value, 0.5)
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
    sliced = [torch.nn.functional.pad(t, (1, 2, 0, 1))[:, :, : shape[0], 1 : 1 + shape[1]] for t in tensors]
    for layout in (transposed, channels_last, sliced):
        for got, want in zip(run(*layout), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize(("channels", "height", "width"), [(512, 2, 97), (16, 1, 600)])
def test_float32_sums(emulator, architecture, channels, height, width):
    """Sums over as many channels as DANet's, and over a line too long for one tensor-core accumulator, whose additions
    truncate. Values are non-negative, as after a ReLU."""
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
    """Two samples 2^31 elements apart, with untouched memory in between."""
    if os.environ.get("SEGATTN_EMULATOR_VARIANT") == "asan":
        pytest.skip("the sanitizer's shadow memory would touch the memory in between")
    tensors = inputs(8, 16, 6, 10, torch.bfloat16, batch=2)
    far = []
    for t in tensors[:3]:
        view = torch.empty(2**31 + t[0].numel(), dtype=t.dtype).as_strided(t.shape, (2**31, *t.stride()[1:]))
        far.append(view.copy_(t))
    for a, b in zip(run(*tensors), run(*far, tensors[3]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_strides_beyond_the_kernels_are_copied(emulator, dim):
    """Channels, rows or columns 2^29 elements apart, with untouched memory in between."""
    if os.environ.get("SEGATTN_EMULATOR_VARIANT") == "asan":
        pytest.skip("the sanitizer's shadow memory would touch the memory in between")
    tensors = inputs(3, 3, 4, 3, torch.bfloat16)
    far = []
    for t in tensors:
        strides = list(t.stride())
        strides[dim] = 2**29
        view = torch.empty(2**29 * t.shape[dim] + t.numel(), dtype=t.dtype).as_strided(t.shape, strides)
        far.append(view.copy_(t))
    for a, b in zip(run(*tensors), run(*far), strict=True):
        assert torch.equal(a, b)


def test_float64_gradients(emulator):
    leaves = [t.requires_grad_() for t in inputs(3, 5, 4, 7, torch.float64)[:3]]
    assert torch.autograd.gradcheck(lambda *t: OPERATORS.criss_cross_attention(*t, 0.7)[0], leaves, fast_mode=True)


# ---- instrumented builds --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_race_build(emulator):
    """Fails on races in shared memory; also counts memory accesses."""
    chosen = "traffic or conflicts or long_lines or missing or gradients or same_bits or rise_or_fall"
    run_in("race", __file__, f"({chosen}) and not 1700 and not 400 and not 500")


@pytest.mark.slow
def test_asan_build(emulator):
    run_in("asan", __file__, "(every_device or long_lines or gradients or any_layout) and not 1700")
