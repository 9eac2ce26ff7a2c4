"""Criss-cross attention at energies in the thousands, as in CCNet, which does not divide by sqrt(E). There the rounding
of a float32 logsumexp changes all weights of a query by up to 2.4e-4."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import segattn_ops

from ..families import eager_affinity, eager_criss_cross

NAMES = ("output", "grad_query", "grad_key", "grad_value")
# Of the relative L2 error. Results of 16 bits are rounded once, those of float32 have the errors of their sums.
FLOOR = {torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def inputs(energy: float, scale: float, dtype: torch.dtype, *, twins: bool) -> list[Tensor]:
    """query, key, value and grad_output with energies of a standard deviation of `energy`. Nearly every query attends
    to one key alone. With twins every other column repeats the keys of the one before it, up to energies of about 1,
    and the query attends to both."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_output = (
        torch.randn((2, channels, 11, 14), generator=generator) for channels in (9, 9, 21, 21)
    )
    spread = (energy / abs(scale) / 3) ** 0.5
    if twins:
        key[..., 1::2] = key[..., 0::2] + key[..., 1::2] / energy
    return [t.to(dtype) for t in (query * spread, key * spread, value, grad_output)]


def results(function, tensors: list[Tensor], scale: float, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Output and gradients of `function`, computed in dtype."""
    query, key, value, grad_output = (t.to(device, dtype) for t in tensors)
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    output = function(*leaves, scale)
    return [t.detach().cpu() for t in (output, *torch.autograd.grad(output, leaves, grad_output))]


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def assert_as_exact_as_eager(
    kernels, tensors: list[Tensor], scale: float, names: tuple[str, ...], product_error: float = 0
) -> None:
    dtype = tensors[0].dtype
    exact = results(eager_criss_cross, tensors, scale, torch.float64)
    eager = results(eager_criss_cross, tensors, scale, dtype)
    got = results(segattn_ops.criss_cross_attention, tensors, scale, dtype, kernels.device)
    for name, g, e, x in zip(NAMES, got, eager, exact, strict=True):
        if name in names:
            error, eager_error = relative_error(g, x), relative_error(e, x)
            # Energies in float16 overflow in eager PyTorch.
            allowed = (0 if math.isnan(eager_error) else 2 * eager_error) + FLOOR[dtype] + product_error
            assert error <= allowed, f"{name}: {error:.1e}, eager's {eager_error:.1e}"


@pytest.mark.parametrize("scale", [1.0, 0.3, -0.7])
@pytest.mark.parametrize("energy", [100.0, 1000.0, 8000.0])
@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
def test_one_key_for_each_query(kernels, dtype, energy, scale):
    """Weights of 0 and 1 are exact in eager PyTorch, whatever the energies. The gradients of query and key vanish."""
    tensors = inputs(energy, scale, dtype, twins=False)
    assert_as_exact_as_eager(kernels, tensors, scale, ("output", "grad_value"))


@pytest.mark.parametrize("scale", [1.0, -0.7])
@pytest.mark.parametrize("energy", [100.0, 1000.0, 8000.0])
@pytest.mark.parametrize("dtype", list(FLOOR), ids=str)
def test_two_keys_for_each_query(kernels, dtype, energy, scale):
    # The products of 3xTF32 have errors of two units in the last place. Energies have that error, and so has
    # grad_query, where two keys cancel up to 1 / energy of their size.
    product_error = 0 if kernels.name == "cpu" or dtype != torch.float32 else 2 * energy * torch.finfo(dtype).eps
    assert_as_exact_as_eager(kernels, inputs(energy, scale, dtype, twins=True), scale, NAMES, product_error)


def test_float64(kernels):
    """Against 80-bit floats."""
    if np.finfo(np.longdouble).nmant <= 52:
        pytest.skip("long double is no wider than float64")
    tensors = inputs(8000.0, 1.0, torch.float64, twins=False)
    query, key, _, grad_output = (t.numpy().astype(np.longdouble) for t in tensors)
    height, width = query.shape[2:]
    column = np.einsum("beyx,bejx->bjyx", query, key)
    column[:, range(height), range(height)] = -np.inf  # the query itself counts in its row
    energies = np.concatenate([np.einsum("beyx,beyj->bjyx", query, key), column], 1)
    weights = np.exp(energies - energies.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    exact = np.einsum("bjyx,bcyx->bcyj", weights[:, :width], grad_output)
    exact += np.einsum("bjyx,bcyx->bcjx", weights[:, width:], grad_output)

    def error(function, device):
        grad_value = results(function, tensors, 1.0, torch.float64, device)[3].numpy()
        return float(np.linalg.norm(grad_value - exact) / np.linalg.norm(exact))

    assert error(segattn_ops.criss_cross_attention, kernels.device) <= 2 * error(eager_criss_cross, "cpu") + 2e-16


def exact_energies(dtype: torch.dtype) -> list[Tensor]:
    """query, key, value and grad_output of whole numbers, whose products with key are exact, up to 8 * 40 * 30."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randint(-n, n + 1, (2, 8, 11, 14), generator=generator) for n in (40, 30))
    return [query.to(dtype), key.to(dtype), *(torch.randn((2, 5, 11, 14), generator=generator).to(dtype) for _ in "vg")]


@pytest.mark.parametrize("scale", [1.0, -0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logsumexp_and_its_rounding_error(kernels, dtype, scale):
    query, key, value, _ = (t.to(kernels.device) for t in exact_energies(dtype))
    _, logsumexp, low = kernels.operators.criss_cross_attention(query, key, value, scale)
    exact = (scale * eager_affinity(query.double(), key.double())).logsumexp(1)
    assert exact.abs().max() > 1000
    assert ((low.abs() <= torch.finfo(torch.float32).eps / 2 * logsumexp.abs()).all()) and low.any()
    assert (logsumexp.double() + low.double() - exact).abs().max() < 2e-6


def test_backward_is_a_function_of_the_given_logsumexp(kernels):
    """A logsumexp that covers further keys, elsewhere, gives this part's share of the weights. At any energies: here
    the other keys have as much weight, and the shares are half."""
    query, key, value, grad_output = (t.to(kernels.device) for t in exact_energies(torch.float32))
    operators = kernels.operators
    output, logsumexp, low = operators.criss_cross_attention(query, key, value, 1.0)

    def grad_value(*split):
        return operators.criss_cross_attention_backward(
            grad_output, query, key, value, output, split[0], 1.0, *split[1:]
        )[2]

    own = grad_value(logsumexp, low)
    assert relative_error(grad_value(logsumexp, low + math.log(2)), 0.5 * own.double()) < 1e-6
    # Without its rounding error the logsumexp of 1000 and more is exact to half a unit in the last place.
    shared = (logsumexp.double() + low.double() + math.log(2)).float()
    assert relative_error(grad_value(shared), 0.5 * own.double()) < 5e-4


def large_negative_keys(dtype: torch.dtype, rows: list[int], columns: list[int]) -> list[Tensor]:
    """query, key and value: energies of -inf for all keys of some rows and columns. The keys are finite where the
    products of 16 such channels are not."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn((2, 16, 6, 7), generator=generator).to(dtype) for _ in range(3))
    lowest = -math.inf if dtype == torch.float16 else -torch.finfo(dtype).max / 2
    key[:, :, rows] = lowest
    key[..., columns] = lowest
    return [query.abs() + 4, key, value]


@pytest.mark.parametrize(("rows", "columns"), [([2], []), ([], [3]), ([2, 3], [0, 6])])
@pytest.mark.parametrize("dtype", [torch.float64, *FLOOR], ids=str)
def test_energies_of_minus_infinity_along_a_line(kernels, dtype, rows, columns):
    """Of a whole row or column: the other line counts alone. Of both: NaN, as the softmax in eager PyTorch."""
    tensors = large_negative_keys(dtype, rows, columns)
    lost = torch.zeros(6, 7, dtype=torch.bool)
    lost[rows] = True
    lost = lost & torch.isin(torch.arange(7), torch.tensor(columns))
    output = segattn_ops.criss_cross_attention(*(t.to(kernels.device) for t in tensors), 1.0).cpu()
    eager = eager_criss_cross(*(t.double().clamp(min=-1e200) for t in tensors), 1.0)
    assert torch.equal(output.isnan(), lost.expand(output.shape))
    torch.testing.assert_close(output[..., ~lost].double(), eager[..., ~lost], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_beside_energies_of_minus_infinity(kernels, dtype):
    tensors = [*large_negative_keys(dtype, [2], []), torch.ones(2, 16, 6, 7)]
    got = results(segattn_ops.criss_cross_attention, tensors, 1.0, dtype, kernels.device)
    assert all(t.isfinite().all() for t in got)
    assert not got[2][:, :, 2].any() and not got[3][:, :, 2].any()  # keys that no query attends to


def test_a_scale_of_zero_gives_the_mean_of_row_and_column(kernels):
    tensors = inputs(1000.0, 1.0, torch.float32, twins=False)
    got = results(segattn_ops.criss_cross_attention, tensors, 0.0, torch.float32, kernels.device)
    exact = results(eager_criss_cross, tensors, 0.0, torch.float64)
    assert not got[1].any() and not got[2].any()
    assert relative_error(got[0], exact[0]) < 1e-6 and relative_error(got[3], exact[3]) < 1e-6
