"""The CUDA kernels of channel_energy and channel_apply on the emulator, beyond the operator suite: work, the kernels
that a problem or device selects, and the race and address sanitizer builds."""

import pytest
import torch

from segattn_ops import reference

from ..emulated import assert_same_bits, run_in
from .test_channel import DEPTH, OPERATORS, TILE, inputs, launches, padded

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def run(x, grad_output, scale=-0.05, gamma=0.7):
    """output, logsumexp, and the gradient of the energy and of the input that two calls compute"""
    energy = OPERATORS.channel_energy(x)
    factors = torch.full_like(energy[:, :, 0], gamma)
    output, logsumexp = OPERATORS.channel_apply(energy, x, scale, factors)
    grad_energy, grad_value, _ = OPERATORS.channel_apply_backward(grad_output, energy, x, scale, factors)
    return output, logsumexp, grad_energy, grad_value + OPERATORS.channel_energy_backward(grad_energy, x)[0]


def worst_error(x, grad_output, scale=-0.05, gamma=0.7):
    leaf = x.double().requires_grad_()
    factors = torch.full_like(leaf[:, :, 0], gamma).detach()
    energy = reference.channel_energy(leaf)
    output, logsumexp = reference.channel_apply(energy, leaf, scale, factors)
    gradients = torch.autograd.grad(output, (energy, leaf), grad_output.double())
    wanted = output.detach(), logsumexp.detach(), *gradients
    pairs = zip(run(x, grad_output, scale, gamma), wanted, strict=True)
    return max(((got.double() - want).norm() / want.norm()).item() for got, want in pairs)


def test_half_of_a_symmetric_energy_is_computed(emulator):
    emulator.set_device(90, 1)
    x, _ = inputs(384, 300, torch.bfloat16)
    OPERATORS.channel_energy(x)
    OPERATORS.channel_energy(x, x.clone())
    symmetric, general = launches(emulator, "gram_kernel")
    tile = 2 * TILE * TILE * padded(300, DEPTH)
    assert (symmetric["mma_flops"], general["mma_flops"]) == (6 * tile, 9 * tile)
    assert not launches(emulator, "sum_splits_kernel")  # one split is the sum


def test_splits_are_added_in_the_order_of_the_softmax(emulator):
    x, _ = inputs(130, 700, torch.bfloat16)
    energy = OPERATORS.channel_energy(x)
    (gram,) = launches(emulator, "gram_kernel")
    assert gram["grid"][0] == 3 * 8  # 3 tiles, 8 splits
    assert len(launches(emulator, "sum_splits_kernel")) == 1
    for got, expected in zip(
        OPERATORS.channel_apply(energy, x, -0.05), OPERATORS.channel_self_attention(x, -0.05), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("architecture", [75, 90])
def test_every_device(emulator, architecture, dtype):
    emulator.set_device(architecture)
    assert worst_error(*inputs(40, 150, dtype, batch=2)) < TOLERANCE[dtype]
    ours = architecture >= 80 and dtype in (torch.float16, torch.bfloat16)
    assert bool(launches(emulator, "gram_kernel")) == ours
    for kernel in ("normalise_rows_kernel", "scale_rows_kernel"):
        assert bool(launches(emulator, kernel)) == (dtype == torch.float16)


@pytest.mark.parametrize(("channels", "positions"), [(1, 1), (7, 9), (129, 65), (150, 97 * 3)])
def test_odd_sizes(emulator, channels, positions):
    assert worst_error(*inputs(channels, positions, torch.float16)) < TOLERANCE[torch.float16]


def test_rows_that_have_no_scale(emulator):
    """Zeros, and what is not finite, pass without a factor; subnormal rows with the least factor."""
    energy = torch.zeros(1, 4, 3)
    energy[0, 1, 0], energy[0, 2, 1], energy[0, 3] = torch.inf, torch.nan, 1e-42
    key = torch.ones(1, 3, 5, dtype=torch.float16)
    got = OPERATORS.channel_energy_backward(energy, torch.ones(1, 4, 5, dtype=torch.float16), key, [True, False])[0]
    assert torch.equal(got[0, 0], torch.zeros_like(got[0, 0])) and torch.equal(got[0, 3], torch.zeros_like(got[0, 3]))
    assert got[0, 1].isinf().all() and got[0, 2].isnan().all()


def test_a_tensor_that_is_not_a_view(emulator):
    """Results that are summed over ranks in place."""
    for positions in (40, 700):  # one split, and several
        x, grad_output = inputs(16, positions, torch.float16)
        energy = OPERATORS.channel_energy(x)
        grad_energy, _, _ = OPERATORS.channel_apply_backward(grad_output, energy, x, 1.0)
        for result in (energy, grad_energy):
            assert not result._is_view() and result.untyped_storage().nbytes() == 4 * result.numel()


def test_an_energy_is_only_read(emulator):
    x, grad_output = inputs(20, 50, torch.bfloat16)
    energy = OPERATORS.channel_energy(x)
    before = energy.clone()
    OPERATORS.channel_apply(energy, x, -0.1)
    OPERATORS.channel_apply_backward(grad_output, energy, x, -0.1)
    OPERATORS.channel_energy_backward(energy, x)
    assert torch.equal(energy, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_any_schedule_gives_the_same_bits(emulator, dtype):
    tensors = inputs(140, 300, dtype)
    assert_same_bits(emulator, lambda: run(*tensors))


@pytest.mark.slow
def test_race_build(emulator):
    run_in("race", __file__, "odd_sizes or same_bits or every_device or splits")


@pytest.mark.slow
def test_asan_build(emulator):
    run_in("asan", __file__, "odd_sizes or splits or every_device or scale")
