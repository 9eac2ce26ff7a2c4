"""The CUDA kernels of channel attention on the emulator, beyond the operator suite: work and traffic of the 16-bit
kernels, the kernels that a problem or device selects, and the race and address sanitizer builds."""

import math

import pytest
import torch

from segattn_ops import reference

from ..emulated import assert_same_bits, conflicts, global_bytes, run_in

OPERATORS = torch.ops.segattn_emulated
TILE, DEPTH = 128, 64


def inputs(channels, positions, dtype, batch=1):
    """input and grad_output"""
    generator = torch.Generator().manual_seed(channels + positions)
    return [torch.randn((batch, channels, positions), generator=generator).to(dtype) for _ in range(2)]


def run(x, grad_output, scale=-0.05):
    """output, logsumexp and gradient of the self-attention"""
    output, logsumexp = OPERATORS.channel_self_attention(x, scale)
    return output, logsumexp, OPERATORS.channel_self_attention_backward(grad_output, x, scale)[0]


def worst_error(x, grad_output, scale=-0.05):
    leaf = x.double().requires_grad_()
    output, logsumexp = reference.channel_attention(leaf, leaf, leaf, scale)
    wanted = output.detach(), logsumexp.detach(), *torch.autograd.grad(output, leaf, grad_output.double())
    pairs = zip(run(x, grad_output, scale), wanted, strict=True)
    return max(((got.double() - want).norm() / want.norm()).item() for got, want in pairs)


def launches(emulator, name):
    return [r for r in emulator.report() if name in r["kernel"]]


def padded(size, multiple):
    return math.ceil(size / multiple) * multiple


# ---- work and traffic ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [256, 300])
def test_half_of_a_symmetric_product_is_computed(emulator, positions):
    emulator.set_device(90, 1)
    x, grad_output = inputs(384, positions, torch.bfloat16)
    OPERATORS.channel_self_attention(x, -1.0)
    (gram,) = launches(emulator, "gram_kernel")
    tile = 2 * TILE * TILE * padded(positions, DEPTH)
    assert gram["mma_flops"] == 6 * tile  # of 9 tiles
    emulator.reset()
    OPERATORS.channel_self_attention_backward(grad_output, x, -1.0)
    energies, grad_weights = launches(emulator, "gram_kernel")
    assert (energies["mma_flops"], grad_weights["mma_flops"]) == (6 * tile, 9 * tile)
    (grad_input,) = launches(emulator, "channel_combine_kernel")
    assert grad_input["mma_flops"] == 2 * 384 * padded(positions, TILE) * 2 * 384


def test_traffic(traced):
    """A tile of the product reads both its operands once, a tile on the diagonal only one. The result is written once,
    mirrored tiles included."""
    traced.set_device(90, 1)
    x, grad_output = inputs(256, 512, torch.bfloat16)
    OPERATORS.channel_self_attention_backward(grad_output, x, -1.0)
    gram = launches(traced, "gram_kernel")[0]
    moved = global_bytes(gram)
    assert moved["global_async_read"] == (2 + 1 + 1) * TILE * 512 * 2
    assert moved["global_write"] == 4 * 256 * 256
    (grad_input,) = launches(traced, "channel_combine_kernel")
    moved = global_bytes(grad_input)
    tiles = 2 * 4  # channels, positions
    assert moved["global_async_read"] == tiles * 2 * 256 * (TILE + TILE) * 2


@pytest.mark.parametrize("channels", [128, 200])
def test_bank_conflicts(traced, channels):
    run(*inputs(channels, 264, torch.float16))
    for name in ("gram_kernel", "channel_combine_kernel", "symmetrise_kernel"):
        for launch in launches(traced, name):
            assert conflicts(launch) <= 1.1, launch["kernel"]


# ---- paths -----------------------------------------------------------------------------------------------------------

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("architecture", [75, 90])
def test_every_device(emulator, architecture, dtype):
    emulator.set_device(architecture)
    assert worst_error(*inputs(40, 150, dtype, batch=2)) < TOLERANCE[dtype]
    ours = architecture >= 80 and dtype in (torch.float16, torch.bfloat16)
    assert bool(launches(emulator, "gram_kernel")) == ours


@pytest.mark.parametrize(("channels", "positions"), [(1, 1), (7, 9), (129, 65), (150, 97 * 3)])
def test_odd_sizes(emulator, channels, positions):
    assert worst_error(*inputs(channels, positions, torch.float16)) < TOLERANCE[torch.float16]


def test_positions_are_split_and_added_in_order(emulator):
    x, grad_output = inputs(130, 700, torch.bfloat16)
    OPERATORS.channel_self_attention(x, -0.05)
    (gram,) = launches(emulator, "gram_kernel")
    assert gram["grid"][0] == 3 * 8  # 3 tiles, 8 splits of three steps: 22 steps of 32 in at most 8 splits
    assert worst_error(x, grad_output) < TOLERANCE[torch.bfloat16]


def test_energies_beyond_float16(emulator):
    """DANet's energies: 40,000 and more overflow float16, and no 16-bit type has the precision for their softmax."""
    x = torch.randn(1, 64, 2000, generator=torch.Generator().manual_seed(0)).abs().mul(8).half()
    assert (x.float() @ x.float().mT).max() > 2 * torch.finfo(torch.float16).max
    output, logsumexp = OPERATORS.channel_self_attention(x, -1e-3)
    wanted, wanted_logsumexp = reference.channel_attention(x.double(), x.double(), x.double(), -1e-3)
    assert torch.isfinite(output).all()
    torch.testing.assert_close(output.double(), wanted, rtol=4e-3, atol=4e-3)
    torch.testing.assert_close(logsumexp.double(), wanted_logsumexp, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_any_schedule_gives_the_same_bits(emulator, dtype):
    tensors = inputs(140, 300, dtype)
    assert_same_bits(emulator, lambda: run(*tensors))


def test_autocast_leaves_the_operator_alone(emulator):
    x, _ = inputs(8, 20, torch.float32)
    expected = OPERATORS.channel_self_attention(x, -1.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = OPERATORS.channel_self_attention(x, -1.0)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_float64_gradients(emulator):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 5, 7), (1, 4, 7), (1, 4, 9)]
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    assert torch.autograd.gradcheck(lambda *t: OPERATORS.channel_attention(*t, 0.3)[0], leaves)
    assert torch.autograd.gradcheck(lambda x: OPERATORS.channel_self_attention(x, -0.3)[0], leaves[:1])


# ---- sanitizer builds ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_race_build(emulator):
    """Shared-memory races fail; memory accesses are counted."""
    run_in("race", __file__, "traffic or conflicts or odd_sizes or same_bits or every_device")


@pytest.mark.slow
def test_asan_build(emulator):
    run_in("asan", __file__, "odd_sizes or split or every_device")
