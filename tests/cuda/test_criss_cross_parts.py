"""The kernels of criss_cross_rows and criss_cross_columns, emulated: which are launched, on which device, and the race
and address-sanitizer builds."""

import math

import pytest
import torch

from segattn_ops import reference

from ..emulated import assert_same_bits, run_in
from ..ops.test_criss_cross_parts import PARTS, by_parts
from .test_criss_cross import OPERATORS, exact, inputs, kernels, launched


def run(part, query, key, value, grad_output, scale=0.5):
    """Output, logsumexp and the three gradients of a part."""
    output, *logsumexp = getattr(OPERATORS, part)(query, key, value, scale)
    delta = (grad_output.to(output.dtype) * output).sum(1)
    backward = getattr(OPERATORS, f"{part}_backward")
    return output, logsumexp[0], *backward(grad_output, query, key, value, *logsumexp, delta, scale)


def worst_error(tensors):
    """Of the parts merged."""
    output, _, *gradients = exact(*tensors)
    got = by_parts(OPERATORS, *tensors, 0.5)
    return max(((g.double() - x).norm() / x.norm()).item() for g, x in zip(got, (output, *gradients), strict=True))


TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("architecture", [75, 80, 86, 90])
def test_every_device(emulator, architecture, dtype):
    """16-bit inputs are exact in TF32, which multiplies them where tensor cores do. Before sm_80 they are float32."""
    emulator.set_device(architecture)
    assert worst_error(inputs(12, 40, 9, 70, dtype)) < TOLERANCE[dtype]
    arithmetic = {torch.float64: "LineSimt<double>", torch.float32: "LineTf32<3>"}.get(dtype, "LineTf32<1>")
    if architecture < 80 and dtype != torch.float64:
        arithmetic = "LineSimt<float>"
    names = [name for name in kernels(emulator) if "line_" in name]
    assert names and all(arithmetic in name for name in names)


@pytest.mark.parametrize(
    ("architecture", "dtype", "height", "width"),
    [
        (90, torch.bfloat16, 3, 300),  # longer than the owned positions of a block
        (86, torch.float16, 260, 2),
        (86, torch.bfloat16, 2, 900),  # all weights do not fit: several passes
        (75, torch.float64, 2, 400),
        (75, torch.float32, 500, 2),
    ],
)
def test_long_lines(emulator, architecture, dtype, height, width):
    emulator.set_device(architecture)
    assert worst_error(inputs(4, 6, height, width, dtype)) < TOLERANCE[dtype]


def test_a_long_row_without_keys(emulator):
    """In passes its weights are exp(-inf - -inf) = NaN, and its output is set to 0."""
    emulator.set_device(75)
    query, key, value, grad_output = inputs(16, 6, 3, 500, torch.float64)
    query = query.abs() + 4
    key[:, :, 1] = -torch.finfo(torch.float64).max / 2
    output, logsumexp, *gradients = run("criss_cross_rows", query, key, value, grad_output)
    assert "line_statistics_kernel" in launched(emulator)
    assert (logsumexp[:, 1] == -math.inf).all() and logsumexp[:, ::2].isfinite().all()
    assert all(t.isfinite().all() and not t[:, :, 1].any() for t in (output, *gradients))
    assert output[:, :, ::2].all()


def test_each_part_launches_its_own_direction(emulator):
    tensors = inputs(4, 6, 5, 20, torch.bfloat16)
    for part in PARTS:
        emulator.reset()
        run(part, *tensors)
        assert launched(emulator) == [
            "line_attention_kernel",
            "clear_without_keys_kernel",
            "logsumexp_of_weights_kernel",
            "line_backward_kernel",
        ]
    emulator.reset()
    run("criss_cross_columns", *inputs(4, 6, 1, 20, torch.bfloat16))
    assert launched(emulator) == []


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_a_single_gradient_has_its_own_kernel(emulator, needs):
    query, key, value, grad_output = inputs(4, 6, 5, 20, torch.float32)
    for part in PARTS:
        _, logsumexp, low = getattr(OPERATORS, part)(query, key, value, 0.5)
        emulator.reset()
        backward = getattr(OPERATORS, f"{part}_backward")
        backward(grad_output, query, key, value, logsumexp, low, logsumexp, 0.5, list(needs))
        assert launched(emulator) == ["logsumexp_of_weights_kernel", "line_sum_kernel"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_any_schedule_gives_the_same_bits(emulator, part, dtype):
    tensors = inputs(8, 40, 9, 70, dtype)
    assert_same_bits(emulator, lambda: run(part, *tensors))


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_strides_beyond_the_kernels_are_copied(emulator, dim):
    """Channels, rows or columns 2^29 elements apart, with untouched memory in between."""
    tensors = inputs(3, 3, 4, 3, torch.float32)
    far = []
    for t in tensors:
        strides = list(t.stride())
        strides[dim] = 2**29
        view = torch.empty(2**29 * t.shape[dim] + t.numel(), dtype=t.dtype).as_strided(t.shape, strides)
        far.append(view.copy_(t))
    for part in PARTS:
        for a, b in zip(run(part, *tensors), run(part, *far), strict=True):
            assert torch.equal(a, b)


def test_parts_of_one_line(emulator):
    """A row of an image of one row is the whole."""
    tensors = inputs(8, 16, 1, 70, torch.float32)
    got = run("criss_cross_rows", *tensors)
    want = reference.criss_cross_attention(*(t.double() for t in tensors[:3]), 0.5)
    for g, w in zip(got[:2], want, strict=True):
        assert (g.double() - w).norm() < 3e-6 * w.norm()


@pytest.mark.slow
def test_race_build(emulator):
    """Fails on races, and on reads of shared memory that nobody has written."""
    run_in("race", __file__, "same_bits or direction or single")


@pytest.mark.slow
def test_asan_build(emulator):
    run_in("asan", __file__, "direction or single")
