"""criss_cross_rows and criss_cross_columns: each part against its definition, and both, merged, against criss-cross
attention."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from segattn_ops import ops, reference
from segattn_ops.ops._check import accumulation_dtype

from ..families import CRISS_CROSS_LARGE, CRISS_CROSS_SIZES, DTYPES, eager_criss_cross
from ..tolerance import assert_as_exact_as_eager
from . import test_large_energies
from .test_dtensor import check_rules, drawn

PARTS = ("criss_cross_rows", "criss_cross_columns")
RESULTS = ("output", "grad_query", "grad_key", "grad_value")
# (B, E, C, H, W), scale; the last are longer than a tile, and than a block of queries on the CPU
SIZES = (
    *CRISS_CROSS_SIZES[:CRISS_CROSS_LARGE],
    ((1, 4, 6, 3, 140), 0.3),
    ((1, 4, 6, 140, 3), -0.3),
    ((1, 4, 6, 2, 300), 0.5),
    ((1, 4, 6, 300, 2), 0.5),
    ((1, 64, 256, 97, 97), 0.125),
)
LARGE = len(SIZES) - 1  # from here on; too much for the emulator
Statistics = tuple[Tensor, Tensor, Tensor]  # output, logsumexp, its rounding error


def small(kernels, case: int):
    if case >= LARGE and not kernels.runs_large:
        pytest.skip("too much for the emulator")
    return SIZES[case]


def inputs(sizes: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """query, key, value and grad_output."""
    batch, key_channels, value_channels, *image = sizes
    generator = torch.Generator().manual_seed(sum(sizes))
    channels = (key_channels, key_channels, value_channels, value_channels)
    drawn = (torch.randn((batch, c, *image), generator=generator, dtype=torch.float64) for c in channels)
    return [t.to(device, dtype) for t in drawn]


def merged(rows: Statistics, columns: Statistics) -> Statistics:
    outputs, values, lows = zip(rows, columns, strict=True)
    most = torch.maximum(*values)
    shift = most.masked_fill(most == -torch.inf, 0)
    weights = [((value - shift) + low).exp() for value, low in zip(values, lows, strict=True)]
    total = weights[0] + weights[1]
    output = sum(w.unsqueeze(1) * o for w, o in zip(weights, outputs, strict=True))
    logsumexp = shift + total.log()
    low = ((shift - logsumexp) + total.log()).masked_fill(~logsumexp.isfinite(), 0)
    return output / total.masked_fill(total == 0, 1).unsqueeze(1), logsumexp, low


def by_parts(
    operators, query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, scale: float
) -> tuple[Tensor, ...]:
    """Criss-cross attention and its gradients, in the dtype of accumulation."""
    tensors = (query, key, value)
    output, *logsumexp = merged(*(getattr(operators, part)(*tensors, scale) for part in PARTS))
    delta = (grad_output.to(output.dtype) * output).sum(1)
    gradients = [
        getattr(operators, f"{part}_backward")(grad_output, *tensors, *logsumexp, delta, scale) for part in PARTS
    ]
    return output, *(row + column for row, column in zip(*gradients, strict=True))


def differentiated(function, tensors: list[Tensor], scale: float, dtype: torch.dtype) -> list[Tensor]:
    """The output of `function` and its gradients, computed in dtype on the CPU, in the dtype of accumulation."""
    *given, grad_output = (t.detach().cpu().to(dtype) for t in tensors)
    leaves = [t.requires_grad_() for t in given]
    output = function(*leaves, scale)
    gradients = torch.autograd.grad(output, leaves, grad_output.to(output.dtype), materialize_grads=True)
    return [t.detach().to(accumulation_dtype(dtype)) for t in (output, *gradients)]


def in_dtype(part: str):
    """The definition of a part's output, with the roundings of eager PyTorch in the dtype of its arguments."""

    def eager(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if part == "criss_cross_columns":
            query, key, value = query.mT, key.mT, value.mT
        energy = scale * torch.einsum("bcyi,bcyj->byij", query, key)
        if part == "criss_cross_columns":
            energy = energy.masked_fill(torch.eye(energy.shape[-1], dtype=torch.bool), -torch.inf)
        output = torch.einsum("byij,bcyj->bcyi", energy.softmax(3).nan_to_num(0), value)
        return output.mT if part == "criss_cross_columns" else output

    return eager


def is_empty(part: str, sizes: tuple[int, ...]) -> bool:
    """A column of one position, which is left out."""
    return part == "criss_cross_columns" and sizes[3] == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", range(len(SIZES)), ids=lambda i: "x".join(map(str, SIZES[i][0])))
@pytest.mark.parametrize("part", PARTS)
def test_a_part(kernels, part, case, dtype):
    sizes, scale = small(kernels, case)
    *tensors, grad_output = inputs(sizes, dtype, kernels.device)
    output, logsumexp, low = getattr(kernels.operators, part)(*tensors, scale)
    assert output.dtype == logsumexp.dtype == low.dtype == accumulation_dtype(dtype)
    delta = (grad_output.to(output.dtype) * output).sum(1)
    backward = getattr(kernels.operators, f"{part}_backward")
    gradients = backward(grad_output, *tensors, logsumexp, low, delta, scale)
    if is_empty(part, sizes):
        assert not any(t.any() for t in (output, low, *gradients)) and (logsumexp == -torch.inf).all()
        return

    definition = getattr(reference, part)
    doubles = [t.cpu().double() for t in tensors]
    _, exact_logsumexp, _ = definition(*doubles, scale)
    assert (logsumexp.cpu().double() + low.cpu().double() - exact_logsumexp).abs().max() < 64 * torch.finfo(
        output.dtype
    ).eps * max(1, exact_logsumexp.abs().max().item())
    tensors = [*tensors, grad_output]
    exact = differentiated(lambda *a: definition(*a)[0], tensors, scale, torch.float64)
    eager = differentiated(in_dtype(part), tensors, scale, dtype)
    for name, got, e, x in zip(RESULTS, (output, *gradients), eager, exact, strict=True):
        if x.any():
            assert_as_exact_as_eager(name, got.cpu(), e, x)
        else:  # one key alone: dP - delta is 0 up to the rounding of either
            assert got.abs().max() < 64 * torch.finfo(got.dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", range(len(SIZES)), ids=lambda i: "x".join(map(str, SIZES[i][0])))
def test_the_parts_merged_are_criss_cross_attention(kernels, case, dtype):
    sizes, scale = small(kernels, case)
    tensors = inputs(sizes, dtype, kernels.device)
    exact = differentiated(eager_criss_cross, tensors, scale, torch.float64)
    eager = differentiated(eager_criss_cross, tensors, scale, dtype)
    for name, got, e, x in zip(RESULTS, by_parts(kernels.operators, *tensors, scale), eager, exact, strict=True):
        assert_as_exact_as_eager(name, got.cpu(), e, x)


@pytest.mark.parametrize("scale", [1.0, -0.7])
@pytest.mark.parametrize("energy", [100.0, 1000.0, 8000.0])
@pytest.mark.parametrize("dtype", list(test_large_energies.FLOOR), ids=str)
def test_large_energies_merged(kernels, dtype, energy, scale):
    """As of criss_cross_attention: weights that a rounded logsumexp would change by up to 2.4e-4. A part knows no sum
    of energy gradients by which to correct grad_query: the bound is the error of criss_cross_attention without the
    correction, 3e-3 for float32 at 8000."""
    tensors = test_large_energies.inputs(energy, scale, dtype, twins=True)
    exact = differentiated(eager_criss_cross, tensors, scale, torch.float64)
    eager = differentiated(eager_criss_cross, tensors, scale, dtype)
    *given, grad_output = (t.to(kernels.device) for t in tensors)
    got = by_parts(kernels.operators, *given, grad_output, scale)
    output, *logsumexp = kernels.operators.criss_cross_attention(*given, scale)
    uncorrected, *_ = kernels.operators.criss_cross_attention_backward(
        grad_output, *given, output, logsumexp[0], scale, logsumexp[1], keys_complete=False
    )
    # Products in 3xTF32 have errors of two units in the last place, and so have energies.
    product_error = 0 if kernels.name == "cpu" or dtype != torch.float32 else 2 * energy * torch.finfo(dtype).eps
    for name, g, e, x in zip(RESULTS, got, eager, exact, strict=True):
        error, eager_error = (test_large_energies.relative_error(t.cpu(), x) for t in (g, e))
        allowed = (0 if math.isnan(eager_error) else 2 * eager_error) + test_large_energies.FLOOR[dtype] + product_error
        if name == "grad_query":
            allowed += 2 * test_large_energies.relative_error(uncorrected.cpu(), x)
        assert error <= allowed, f"{name}: {error:.1e}, eager's {eager_error:.1e}"


@pytest.mark.parametrize("scale", [1.0, -0.75])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_the_logsumexp_and_its_rounding_error(kernels, part, dtype, scale):
    query, key, value, _ = (t.to(kernels.device) for t in test_large_energies.exact_energies(dtype))
    _, logsumexp, low = getattr(kernels.operators, part)(query, key, value, scale)
    _, exact, _ = getattr(reference, part)(*(t.cpu().double() for t in (query, key, value)), scale)
    assert exact.abs().max() > 1000
    assert (low.abs() <= torch.finfo(torch.float32).eps / 2 * logsumexp.abs()).all() and low.any()
    assert (logsumexp.cpu().double() + low.cpu().double() - exact).abs().max() < 2e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("image", [(6, 7), (3, 140), (140, 3)])
def test_energies_of_minus_infinity(kernels, image, dtype):
    """Keys of -inf throughout a row and a column: the part along them is empty, the other counts alone. Where both are
    empty, so is the merged result, and all its gradients are 0."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_output = (torch.randn((2, 16, *image), generator=generator).to(dtype) for _ in range(4))
    query = query.abs() + 4
    key[:, :, 2] = key[..., 1] = -math.inf if dtype == torch.float16 else -torch.finfo(dtype).max / 2
    tensors = [t.to(kernels.device) for t in (query, key, value, grad_output)]
    statistics = [getattr(kernels.operators, part)(*tensors[:3], 1.0) for part in PARTS]
    along = [torch.zeros(image, dtype=torch.bool) for _ in PARTS]
    along[0][2] = along[1][:, 1] = True
    for (output, logsumexp, low), lost in zip(statistics, along, strict=True):
        assert torch.equal((logsumexp == -torch.inf).cpu(), lost.expand(logsumexp.shape))
        assert not output[..., lost].any() and not low[..., lost].any()
        assert output.isfinite().all() and logsumexp[..., ~lost].isfinite().all()
    results = by_parts(kernels.operators, *tensors, 1.0)
    assert not results[0][..., along[0] & along[1]].any()
    if dtype != torch.float16:  # a weight of 0 times a key of -inf is NaN
        assert all(t.isfinite().all() for t in results)
        assert not results[1][..., along[0] & along[1]].any()
    assert results[3].isfinite().all()
    assert not results[3][:, :, 2].any() and not results[3][..., 1].any()  # keys that no query attends to


@pytest.mark.parametrize("part", PARTS)
def test_a_scale_of_zero_gives_the_mean(kernels, part):
    *tensors, _ = inputs((2, 4, 5, 6, 7), torch.float32)
    output, logsumexp, _ = getattr(kernels.operators, part)(*(t.to(kernels.device) for t in tensors), 0.0)
    exact, exact_logsumexp, _ = getattr(reference, part)(*tensors, 0.0)
    torch.testing.assert_close(output.cpu(), exact, rtol=0, atol=2e-6)
    torch.testing.assert_close(logsumexp.cpu(), exact_logsumexp, rtol=0, atol=2e-6)


@pytest.mark.parametrize("energy", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_energies_of_nan_and_infinity_give_nan(kernels, part, dtype, energy):
    query, key, value, _ = inputs((1, 4, 5, 6, 7), dtype)
    query = query.abs() + 1
    key[0, :, 2, 3] = energy
    output, logsumexp, _ = getattr(kernels.operators, part)(*(t.to(kernels.device) for t in (query, key, value)), 1.0)
    reached = torch.zeros(6, 7, dtype=torch.bool)
    if part == "criss_cross_rows":
        reached[2] = True
    else:
        reached[:, 3] = True
        reached[2, 3] = False
    assert torch.equal(logsumexp[0].isnan().cpu(), reached)
    assert torch.equal(output[0].isnan().cpu(), reached.expand(5, 6, 7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 6, 10, 9, 11), (1, 6, 40, 12, 66)])
@pytest.mark.parametrize("part", PARTS)
def test_any_layout(kernels, part, sizes, dtype):
    tensors = inputs(sizes, dtype, kernels.device)
    height, width = sizes[3:]
    forward, backward = (getattr(kernels.operators, f"{part}{suffix}") for suffix in ("", "_backward"))

    delta = torch.randn(sizes[0], height, width).to(kernels.device)

    def results(*tensors):
        output, *logsumexp = forward(*tensors[:3], 0.5)
        transposed = [t.mT.contiguous().mT for t in (*logsumexp, delta)]
        return output, *logsumexp, *backward(tensors[3], *tensors[:3], *transposed, 0.5)

    expected = results(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(results(*tensors), expected, strict=True))  # deterministic
    for layout in (
        [t.mT.contiguous().mT for t in tensors],
        [t.to(memory_format=torch.channels_last) for t in tensors],
        [torch.nn.functional.pad(t, (1, 2, 0, 1))[:, :, :height, 1 : 1 + width] for t in tensors],
    ):
        for got, want in zip(results(*layout), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 8, 16, 5, 7), (1, 8, 24, 1, 13), (1, 4, 6, 140, 3)])
@pytest.mark.parametrize("part", PARTS)
def test_needed_gradients(kernels, part, sizes, dtype):
    *tensors, grad_output = inputs(sizes, dtype, kernels.device)
    output, logsumexp, low = getattr(kernels.operators, part)(*tensors, 0.5)
    arguments = (grad_output, *tensors, logsumexp, low, (grad_output.to(output.dtype) * output).sum(1), 0.5)
    backward = getattr(kernels.operators, f"{part}_backward")
    expected = backward(*arguments)
    for needs in itertools.product([False, True], repeat=3):
        for got, want, tensor, needed in zip(backward(*arguments, list(needs)), expected, tensors, needs, strict=True):
            assert got.dtype == torch.float32 and got.shape == (tensor.shape if needed else (0,))
            if needed:
                torch.testing.assert_close(got, want, rtol=0, atol=2e-3 * want.abs().max().item() + 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_the_autograd_rule(kernels, part, dtype):
    """Of functions of output and logsumexp."""
    *tensors, grad_output = inputs((2, 5, 6, 7, 9), dtype)
    grad_logsumexp = torch.randn(2, 7, 9, dtype=torch.float64)

    def gradients(function, dtype, device="cpu"):
        leaves = [t.detach().to(device, dtype).requires_grad_() for t in tensors]
        output, logsumexp, _ = function(*leaves, 0.5)
        given = [g.to(device, logsumexp.dtype) for g in (grad_output, grad_logsumexp)]
        both = torch.autograd.grad((output, logsumexp), leaves, given, retain_graph=True)
        return (
            *both,
            *torch.autograd.grad(output, leaves, given[0], retain_graph=True),
            *torch.autograd.grad(logsumexp, leaves[:2], given[1]),
        )

    got = gradients(getattr(kernels.operators, part), dtype, kernels.device)
    definition = getattr(reference, part)
    for g, want in zip(got, gradients(definition, torch.float64), strict=True):
        assert g.dtype == dtype
        error = test_large_energies.relative_error(g.cpu(), want)
        assert error < {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, 16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("part", PARTS)
def test_the_logsumexp_does_not_depend_on_the_values(backend, part):
    """Its gradient is finite where values are not, and that of the values is 0."""
    *tensors, _ = inputs((2, 5, 6, 7, 9), torch.float64)
    tensors[2][0, :, 3, 4] = torch.inf
    weight = torch.randn(2, 7, 9, dtype=torch.float64)

    def gradients(function, values, device):
        leaves = [t.detach().to(device).requires_grad_() for t in (*tensors[:2], values)]
        logsumexp = function(*leaves, 0.5)[1]
        return torch.autograd.grad(logsumexp, leaves, weight.to(device), materialize_grads=True)

    got = gradients(getattr(ops, part), tensors[2], backend.device)
    expected = gradients(getattr(reference, part), torch.zeros_like(tensors[2]), "cpu")
    for g, want in zip(got, expected, strict=True):
        torch.testing.assert_close(g.cpu(), want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("part", PARTS)
def test_gradcheck(kernels, part):
    leaves = [t.requires_grad_() for t in inputs((1, 2, 3, 3, 4), torch.float64, kernels.device)[:3]]
    function = getattr(kernels.operators, part)
    assert torch.autograd.gradcheck(lambda *t: function(*t, 0.7)[:2], leaves, fast_mode=True)


@pytest.mark.parametrize("part", PARTS)
def test_opcheck(kernels, part):
    for dtype in (torch.float32, torch.bfloat16):
        tensors = inputs((2, 8, 16, 5, 7), dtype, kernels.device)
        leaves = [t.detach().requires_grad_() for t in tensors[:3]]
        torch.library.opcheck(getattr(kernels.operators, part).default, (*leaves, 0.5))
        output, *logsumexp = getattr(kernels.operators, part)(*tensors[:3], 0.5)
        backward = getattr(kernels.operators, f"{part}_backward").default
        for needs in ([True] * 3, [True, False, True]):
            arguments = (tensors[3], *tensors[:3], *logsumexp, torch.randn_like(logsumexp[0]), 0.5, needs)
            torch.library.opcheck(backward, arguments)
        assert output.requires_grad is False


@pytest.mark.parametrize("part", PARTS)
def test_no_samples(kernels, part):
    query, key, value, grad_output = (t[:0] for t in inputs((1, 4, 6, 5, 7), torch.bfloat16, kernels.device))
    output, logsumexp, low = getattr(kernels.operators, part)(query, key, value, 1.0)
    backward = getattr(kernels.operators, f"{part}_backward")
    gradients = backward(grad_output, query, key, value, logsumexp, low, logsumexp, 1.0)
    shapes = [list(t.shape) for t in (output, logsumexp, low, *gradients)]
    assert shapes == [[0, 6, 5, 7], [0, 5, 7], [0, 5, 7], [0, 4, 5, 7], [0, 4, 5, 7], [0, 6, 5, 7]]


@pytest.mark.parametrize("part", PARTS)
def test_vmap_and_refused_derivatives(kernels, part):
    function = getattr(ops, part)
    tensors = [t.unsqueeze(1) for t in inputs((3, 4, 5, 6, 7), torch.float32, kernels.device)[:3]]
    mapped = torch.func.vmap(lambda *t: function(*t, 0.5))(*tensors)
    for got, want in zip(mapped, function(*(t.squeeze(1) for t in tensors), 0.5), strict=True):
        assert torch.equal(got.squeeze(1), want)

    def total(*t):
        output, logsumexp, _ = function(*t, 0.5)
        return output.sum() + logsumexp.sum()

    leaves = [t.squeeze(1).requires_grad_() for t in tensors]
    expected = torch.autograd.grad(total(*leaves), leaves)
    for got, want in zip(torch.func.grad(total, (0, 1, 2))(*(t.detach() for t in leaves)), expected, strict=True):
        torch.testing.assert_close(got, want)
    first = torch.autograd.grad(total(*leaves), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{part}_backward: the operator has no second derivative"):
        first[0].sum().backward()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaves[0].detach(), torch.ones_like(leaves[0]))
        with pytest.raises(NotImplementedError, match=f"{part}: the operator has no forward-mode derivative"):
            function(dual, leaves[1], leaves[2], 0.5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("part", PARTS)
def test_functions(backend, part, dtype):
    """With the reference where no kernels serve. In channels_last if query or value is."""
    tensors = [t.to(memory_format=torch.channels_last) for t in inputs((2, 8, 6, 5, 7), dtype, backend.device)[:3]]
    leaves = [t.requires_grad_() for t in tensors]
    results = getattr(ops, part)(*leaves, scale=0.5)
    exact = getattr(reference, part)(*(t.detach().cpu().double() for t in tensors), 0.5)
    for got, want in zip(results[:2], exact[:2], strict=True):
        assert got.dtype == accumulation_dtype(dtype)
        assert (got.cpu().double() - want).abs().max() < 8 * torch.finfo(dtype).eps
    assert results[0].is_contiguous(memory_format=torch.channels_last)
    gradients = torch.autograd.grad(results[0].sum() + results[1].sum(), leaves)
    assert all(g.dtype == dtype for g in gradients) and not results[2].requires_grad


@pytest.mark.parametrize("part", PARTS)
def test_bad_arguments_of_the_functions(backend, part):
    function, x = getattr(ops, part), torch.zeros(1, 2, 3, 4, device=backend.device)
    with pytest.raises(TypeError, match=f"^{part}: value must be a torch.Tensor"):
        function(x, x, None)
    with pytest.raises(TypeError, match=f"^{part}: scale must be a"):
        function(x, x, x, "1")
    with pytest.raises(RuntimeError, match=f"^{part}: scale must be finite"):
        function(x, x, x, math.nan)
    with pytest.raises(RuntimeError, match=f"^{part}: key must have 2 channels like query"):
        function(x, x[:, :1], x)


def test_flops():
    """The parts together have those of criss_cross_attention."""

    def flops(function, *arguments) -> int:
        leaves = [t.requires_grad_() for t in inputs((2, 8, 6, 5, 7), torch.float32)[:3]]
        with FlopCounterMode(display=False) as counter:
            function(*leaves, *arguments)[0].sum().backward()
        return counter.get_total_flops()

    rows, columns = (flops(getattr(torch.ops.segattn, part), 0.5) for part in PARTS)
    assert rows == 2 * 2 * 5 * 7 * 7 * (14 + 3 * 8 + 2 * 6)
    assert rows + columns == flops(torch.ops.segattn.criss_cross_attention, 0.5)


@pytest.mark.parametrize("part", PARTS)
def test_sharding_rules_are_exact(kernels, part):
    shapes = {"query": (3, 5, 4, 6), "key": (3, 5, 4, 6), "value": (3, 7, 4, 6)}
    tensors = drawn(shapes, torch.float64, kernels.device)
    assert check_rules(kernels, part, tensors, (), 1e-12) == 3
    output, logsumexp, low = getattr(kernels.operators, part)(**tensors, scale=0.25)
    saved = {"logsumexp": logsumexp, "logsumexp_low": low, "delta": torch.randn_like(low)}
    arguments = {"grad_output": torch.randn_like(output), **tensors, **saved}
    for needs in ([True] * 3, [False, True, True], [True, False, False]):
        keywords = {"needs_input_grad": needs}
        assert check_rules(kernels, f"{part}_backward", arguments, keywords.items(), 1e-12) == 3


class Both(torch.nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        return merged(ops.criss_cross_rows(query, key, value, 0.5), ops.criss_cross_columns(query, key, value, 0.5))[:2]


def test_compiled_in_one_graph():
    compiled = torch.compile(Both(), fullgraph=True, backend="aot_eager", dynamic=True)
    for sizes in ((1, 4, 5, 6, 7), (2, 4, 5, 8, 3)):
        leaves = [t.requires_grad_() for t in inputs(sizes, torch.bfloat16)[:3]]
        results = [(function(*leaves)[0], leaves) for function in (compiled, Both())]
        torch.testing.assert_close(results[0][0], results[1][0])
        gradients = [torch.autograd.grad(output.square().sum(), leaves) for output, leaves in results]
        for got, want in zip(*gradients, strict=True):
            torch.testing.assert_close(got, want)


def test_onnx(tmp_path):
    """As the definitions."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    tensors = tuple(inputs((1, 4, 5, 6, 7), torch.float32)[:3])
    path = tmp_path / "both.onnx"
    torch.onnx.export(Both().eval(), tensors, path, verbose=False)
    session = onnxruntime.InferenceSession(path)
    feed = {a.name: t.numpy() for a, t in zip(session.get_inputs(), tensors, strict=True)}
    for got, want in zip(session.run(None, feed), Both()(*tensors), strict=True):
        torch.testing.assert_close(torch.from_numpy(got), want)
