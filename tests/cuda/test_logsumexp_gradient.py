"""grad_logsumexp and keys_complete on the kernels of every device; the operator suite runs those of one."""

from itertools import product

import pytest
import torch

from segattn_ops import reference

from .test_position import OPERATORS, inputs, relative_error

# Of mma.sync; Hopper's kernels have tests of their own.
pytestmark = pytest.mark.usefixtures("without_wgmma")

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 4e-6, torch.float64: 1e-12}
DTYPE = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
ARCHITECTURE = pytest.mark.parametrize("architecture", [75, 86, 90])
GRADIENTS = ("grad_query", "grad_key", "grad_value")
SCALE = 0.25


def position_tensors(dtype):
    """Keys with a mean, so that grad_query is wrong in its first digit if a known sum of dS is not the right one."""
    query, key, value, grad_output = inputs(2, 12, 20, 70, 150, dtype)
    grad_logsumexp = torch.randn(2, 70, generator=torch.Generator().manual_seed(3))
    return [query, key + 3, value, grad_output, grad_logsumexp.to(torch.promote_types(dtype, torch.float32))]


def criss_cross_tensors(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, c, 7, 70) for c in (12, 12, 20, 20)]
    query, key, value, grad_output = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    grad_logsumexp = torch.randn(1, 7, 70, generator=generator)
    return [query, key + 3, value, grad_output, grad_logsumexp.to(torch.promote_types(dtype, torch.float32))]


def exact(attention, query, key, value, grad_output, grad_logsumexp):
    leaves = [t.double().requires_grad_() for t in (query, key, value)]
    results = attention(*leaves, SCALE)
    return torch.autograd.grad(results, leaves, [grad_output.double(), grad_logsumexp.double()])


def assert_close(got, expected, dtype):
    for name, a, b in zip(GRADIENTS, got, expected, strict=True):
        assert relative_error(a, b) < TOLERANCE[dtype], name


@DTYPE
@ARCHITECTURE
@pytest.mark.parametrize("complete", [True, False])
def test_position(emulator, architecture, dtype, complete):
    emulator.set_device(architecture)
    query, key, value, grad_output, grad_logsumexp = position_tensors(dtype)
    output, logsumexp, *lows = OPERATORS.position_attention(query, key, value, SCALE, True)
    lows = [t if t.shape[1] > 0 else None for t in lows]
    got = OPERATORS.position_attention_backward(
        grad_output, query, key, value, output, logsumexp, SCALE, *lows, grad_logsumexp,
        keys_complete=complete,
    )  # fmt: skip
    expected = exact(reference.position_attention, query, key, value, grad_output, grad_logsumexp)
    assert_close(got, expected, dtype)


@DTYPE
@ARCHITECTURE
def test_shards_of_position(emulator, architecture, dtype):
    """With logsumexp and output over all keys, two halves of the keys have their own part of the gradients. The half
    whose energies are lower by 40 gets gradients near 0, not those of a softmax of its own."""
    emulator.set_device(architecture)
    query, key, value, grad_output, grad_logsumexp = position_tensors(dtype)
    query = query + 1
    key = torch.cat([key[:, :, :80], key[:, :, 80:] - 13], 2)
    output, logsumexp, *lows = OPERATORS.position_attention(query, key, value, SCALE, True)
    lows = [t if t.shape[1] > 0 else None for t in lows]
    parts = [
        OPERATORS.position_attention_backward(
            grad_output, query, k.contiguous(), v.contiguous(), output, logsumexp, SCALE,
            *lows, grad_logsumexp,
        )
        for k, v in zip(key.split([80, 70], 2), value.split([80, 70], 2), strict=True)
    ]  # fmt: skip
    got = (
        parts[0][0].double() + parts[1][0].double(),
        *(torch.cat([a, b], 2) for a, b in zip(parts[0][1:], parts[1][1:], strict=True)),
    )
    expected = exact(reference.position_attention, query, key, value, grad_output, grad_logsumexp)
    assert_close(got, expected, dtype)
    assert parts[1][2].norm() < 1e-3 * parts[0][2].norm()


@DTYPE
@ARCHITECTURE
@pytest.mark.parametrize("complete", [True, False])
def test_criss_cross(emulator, architecture, dtype, complete):
    emulator.set_device(architecture)
    query, key, value, grad_output, grad_logsumexp = criss_cross_tensors(dtype)
    output, logsumexp, low = OPERATORS.criss_cross_attention(query, key, value, SCALE)
    got = OPERATORS.criss_cross_attention_backward(
        grad_output, query, key, value, output, logsumexp, SCALE, low, grad_logsumexp, keys_complete=complete
    )
    expected = exact(reference.criss_cross_attention, query, key, value, grad_output, grad_logsumexp)
    assert_close(got, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("height", "width"), [(2, 97), (97, 2), (3, 130)])
def test_subsets_of_criss_cross_have_the_same_bits(emulator, dtype, height, width):
    """The sums of single gradients against the kernel of several, with one tile a line, two, and lines too long."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_output = (
        torch.randn(1, c, height, width, generator=generator).to(dtype) for c in (8, 8, 40, 40)
    )
    output, logsumexp, low = OPERATORS.criss_cross_attention(query, key, value, SCALE)

    def gradients(needs):
        return OPERATORS.criss_cross_attention_backward(
            grad_output, query, key, value, output, logsumexp, SCALE, low, None, needs, True
        )

    together = gradients([True, True, True])
    for needs in map(list, product([True, False], repeat=3)):
        for needed, got, expected in zip(needs, gradients(needs), together, strict=True):
            assert torch.equal(got, expected) if needed else got.shape == (0,), needs
