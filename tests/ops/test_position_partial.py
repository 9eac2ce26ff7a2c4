"""Position attention over parts of the keys: merged, the parts are attention over all keys, forward and backward."""

import functools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from segattn_ops import _backend, reference
from segattn_ops.distributed import _parts
from segattn_ops.ops import position_attention, position_attention_partial
from segattn_ops.ops._check import accumulation_dtype

from ..families import DTYPES
from ..tolerance import assert_as_exact_as_eager
from .test_key_padding_mask import SHAPES, eager, make, padding_of, poisoned

SCALE = 0.4
NAMES = ("output", "logsumexp", "grad_query", "grad_key", "grad_value")


def gradients_of_part(
    *arguments: object, needs_input_grad: Sequence[bool] = (True, True, True), key_padding_mask: Tensor | None = None
) -> tuple[Tensor, ...]:
    """As segattn_ops.distributed gets them. arguments: grad_output, query, key, value, logsumexp, its rounding error,
    delta and scale."""
    operators = _backend.operators("position_attention_partial", *arguments[1:4])
    return _parts.backward(operators, "position_attention_partial", arguments, needs_input_grad, key_padding_mask)


def on(device: str, tensors: list[Tensor]) -> list[Tensor]:
    return [t.to(device) for t in tensors]


def cuts(keys: int, parts: int) -> list[slice]:
    """Uneven parts of flattened keys; with four, the third is empty."""
    first = max(1, keys // 5)
    ends = {
        1: [keys],
        2: [first, keys],
        3: [first, min(keys, 3 * first), keys],
        4: [first, min(keys, 3 * first), min(keys, 3 * first), keys],
    }[parts]
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def merge(outputs: list[Tensor], logsumexps: list[Tensor], lows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, C, *S), logsumexp (B, *S) and its rounding error over all parts."""
    maximum = torch.stack(logsumexps).amax(0)
    shift = maximum.masked_fill(maximum == -torch.inf, 0)
    weights = [((logsumexp - shift) + low).exp() for logsumexp, low in zip(logsumexps, lows, strict=True)]
    total = torch.stack(weights).sum(0)
    output = sum(w.unsqueeze(1) * o for w, o in zip(weights, outputs, strict=True))
    is_empty = total == 0
    log = total.masked_fill(is_empty, 1).log()
    logsumexp = (shift + log).masked_fill(is_empty, -torch.inf)
    low = ((shift - logsumexp) + log).masked_fill(is_empty, 0)
    return output / total.masked_fill(is_empty, 1).unsqueeze(1), logsumexp, low


def results_of_parts(
    inputs: list[Tensor],
    gradients: list[Tensor],
    parts: int,
    mask: Tensor | None = None,
    scale: float = SCALE,
    forward=position_attention_partial,
    backward=gradients_of_part,
) -> list[Tensor]:
    """Merged output and logsumexp, and the gradients, in the dtype of accumulation. mask: (B, M)"""
    query, key, value = inputs
    grad_output, grad_logsumexp = gradients
    pieces = [(key.flatten(2)[..., s], value.flatten(2)[..., s]) for s in cuts(key[0, 0].numel(), parts)]
    masks = [{} if mask is None else {"key_padding_mask": mask[:, s]} for s in cuts(key[0, 0].numel(), parts)]
    found = [forward(query, k, v, scale, **m) for (k, v), m in zip(pieces, masks, strict=True)]
    output, logsumexp, low = merge(*(list(t) for t in zip(*found, strict=True)))
    delta = (grad_output.contiguous() * output.contiguous()).sum(1) - grad_logsumexp.squeeze(1)
    found = [
        backward(grad_output, query, k, v, logsumexp, low, delta, scale, **m)
        for (k, v), m in zip(pieces, masks, strict=True)
    ]
    grad_query = sum(g[0] for g in found)
    grad_key, grad_value = (torch.cat([g[i] for g in found], 2).view(t.shape) for i, t in ((1, key), (2, value)))
    return [t.cpu() for t in (output, logsumexp.unsqueeze(1), grad_query, grad_key, grad_value)]


def results_of_all(function, inputs: list[Tensor], gradients: list[Tensor], mask: Tensor, scale: float) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    outputs = function(*leaves, scale, mask)
    grads = torch.autograd.grad(outputs, leaves, [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)])
    return [t.detach().cpu() for t in (*outputs, *grads)]


def assert_parts_are_exact(device, dtype, inputs, gradients, parts, mask, scale=SCALE, energy=12.0):
    """mask: (B, M)"""
    key_mask = torch.zeros(inputs[1].shape[0], *inputs[1].shape[2:], dtype=torch.bool) if mask is None else mask
    exact = results_of_all(eager, [t.double() for t in inputs], [g.double() for g in gradients], key_mask, scale)
    expected = results_of_all(eager, inputs, gradients, key_mask, scale)
    flat = None if mask is None else mask.flatten(1).to(device)
    got = results_of_parts(on(device, inputs), on(device, gradients), parts, flat, scale)
    for name, g, e, x in zip(NAMES, got, expected, exact, strict=True):
        assert g.dtype == accumulation_dtype(dtype)
        assert_as_exact_as_eager(name, g.to(e.dtype), e, x, energy)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_merged_are_the_whole(backend, dtype, shape, parts):
    inputs, gradients = make(shape, dtype)
    assert_parts_are_exact(backend.device, dtype, inputs, gradients, parts, None)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding(backend, dtype, shape):
    """The second part of the last sample is all padding. What padding holds has no influence."""
    inputs, gradients = make(shape, dtype)
    mask = padding_of(shape[0], shape[4])
    mask.view(shape[0], -1)[-1, cuts(mask[0].numel(), 3)[1]] = True
    assert_parts_are_exact(backend.device, dtype, inputs, gradients, 3, mask)
    held = [inputs[0], *(poisoned(t, mask) for t in inputs[1:])]
    arguments = on(backend.device, gradients), 3, mask.flatten(1).to(backend.device)
    for got, expected in zip(
        results_of_parts(on(backend.device, held), *arguments),
        results_of_parts(on(backend.device, inputs), *arguments),
        strict=True,
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("shape", [(1, 64, 130, (17, 19), (300,)), (2, 33, 70, (13, 29), (37, 19))], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles(kernels, dtype, shape):
    inputs, gradients = make(shape, dtype)
    assert_parts_are_exact(kernels.device, dtype, inputs, gradients, 3, None, 0.2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_no_tensor_core_tile_has_room_for(kernels, dtype):
    inputs, gradients = make((1, 1100, 40, (5, 7), (40,)), dtype)
    assert_parts_are_exact(kernels.device, dtype, inputs, gradients, 2, None, 0.02)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides(kernels, dtype):
    (query, key, value), gradients = make((2, 8, 16, (5, 7), (5, 7)), dtype)
    strided = [t.to(memory_format=torch.channels_last) for t in (query, key)] + [value.mT.contiguous().mT]
    others = [gradients[0].to(memory_format=torch.channels_last), gradients[1].mT.contiguous().mT]
    got = results_of_parts(on(kernels.device, strided), on(kernels.device, others), 2)
    expected = results_of_parts(on(kernels.device, [query, key, value]), on(kernels.device, gradients), 2)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_keys_no_queries_no_samples(backend, dtype):
    (query, key, value), (grad_output, grad_logsumexp) = make((2, 8, 16, (5, 7), (5, 7)), dtype)
    query, key, value, grad_output = on(backend.device, [query, key, value, grad_output])
    output, logsumexp, low = position_attention_partial(query, key[..., :0], value[..., :0], 0.5)
    assert not output.any() and (logsumexp == -torch.inf).all() and not low.any()
    statistics = torch.ones_like(logsumexp), torch.zeros_like(logsumexp), torch.ones_like(logsumexp)
    gradients = gradients_of_part(grad_output, query, key[..., :0], value[..., :0], *statistics, 0.5)
    assert not gradients[0].any() and gradients[0].shape == query.shape
    assert gradients[1].shape == (2, 8, 5, 0) and gradients[2].shape == (2, 16, 5, 0)
    empty = [s[:, :0] for s in statistics]
    gradients = gradients_of_part(grad_output[:, :, :0], query[:, :, :0], key, value, *empty, 0.5)
    assert gradients[0].shape == (2, 8, 0, 7) and not gradients[1].any() and not gradients[2].any()
    assert position_attention_partial(query[:, :, :0], key, value, 0.5)[0].shape == (2, 16, 0, 7)
    assert position_attention_partial(query[:0], key[:0], value[:0], 0.5)[0].shape == (0, 16, 5, 7)
    empty = [s[:0] for s in statistics]
    gradients = gradients_of_part(grad_output[:0], query[:0], key[:0], value[:0], *empty, 0.5)
    assert gradients[2].shape == (0, 16, 5, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_energies_of_minus_infinity(backend, dtype):
    """A part whose energies are all -inf for a query has no weight, and no gradients come from it, or from a query
    whose energies are -inf in all parts."""
    (query, key, value), gradients = make((2, 16, 16, (5, 7), (40,)), dtype)
    lowest = -torch.inf if dtype == torch.float16 else -torch.finfo(dtype).max / 2
    query = query.abs() + 4
    key[..., :12] = lowest
    arguments = on(backend.device, [query, key, value])
    output, logsumexp, low = position_attention_partial(query.to(backend.device), *(t[..., :12] for t in arguments[1:]))
    assert not output.any() and (logsumexp == -torch.inf).all() and not low.any()
    # The first part has the keys [0, 8).
    got = results_of_parts(arguments, on(backend.device, gradients), 3)
    # float16 needs keys of -inf, and a weight of 0 times such a key is NaN in grad_query, as in the definition.
    assert all(
        g.isfinite().all() for name, g in zip(NAMES, got, strict=True) if name != "grad_query" or dtype != torch.float16
    )
    assert not got[3][..., :12].any() and not got[4][..., :12].any()
    key[1] = lowest
    got = results_of_parts(on(backend.device, [query, key, value]), on(backend.device, gradients), 2)
    assert not got[0][1].any() and (got[1][1] == -torch.inf).all() and not got[4][1].any()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_energies_of_nan_and_infinity_give_nan(kernels, dtype, poison):
    (query, key, value), _ = make((1, 8, 16, (5, 7), (40,)), dtype)
    key[..., 3] = poison
    output, *_ = position_attention_partial(*on(kernels.device, [query.abs(), key, value]), 0.5)
    assert output.isnan().all()


def exact_energies(dtype: torch.dtype) -> list[Tensor]:
    """query, key, value and grad_output: whole numbers, whose products with key are exact, up to 8 * 40 * 30."""
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.randint(-n, n + 1, (2, 8, *size), generator=generator) for n, size in ((40, (11, 14)), (30, (200,)))
    )
    value, grad = (torch.randn((2, 5, *size), generator=generator) for size in ((200,), (11, 14)))
    return [t.to(dtype) for t in (query, key, value, grad)]


@pytest.mark.parametrize("scale", [1.0, -0.75])
def test_logsumexp_and_its_rounding_error(kernels, scale):
    query, key, value, _ = on(kernels.device, exact_energies(torch.float32))
    _, logsumexp, low = position_attention_partial(query, key, value, scale)
    exact = (scale * query.double().flatten(2).mT @ key.double()).logsumexp(2).view(logsumexp.shape)
    assert exact.abs().max() > 1000
    assert (low.abs() <= torch.finfo(torch.float32).eps / 2 * logsumexp.abs()).all() and low.any()
    assert (logsumexp.double() + low.double() - exact).abs().max() < 2e-6


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("twins", [False, True])
def test_large_energies(kernels, twins, parts):
    """|logsumexp| above 1000 in float32: the weights have no error of its rounding, 6e-5."""
    query, key, value, grad_output = exact_energies(torch.float32)
    if twins:  # every query has pairs of keys of the same weight, in different parts
        key[..., 100:] = key[..., :100]
    gradients = [grad_output, torch.randn(2, 1, 11, 14)]
    inputs = [query, key, value]
    mask = torch.zeros(2, 200, dtype=torch.bool)
    exact = results_of_all(eager, [t.double() for t in inputs], [g.double() for g in gradients], mask, 1.0)
    got = results_of_parts(on(kernels.device, inputs), on(kernels.device, gradients), parts, None, 1.0)
    for name, g, x in zip(NAMES, got, exact, strict=True):
        error = (g.double() - x).norm() / x.norm()
        assert error < 1e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize("twins", [False, True])
def test_all_keys_at_large_energies(kernels, twins):
    """position_attention itself, whose backward takes the rounding error of the logsumexp too."""
    query, key, value, grad_output = exact_energies(torch.float32)
    if twins:
        key[..., 100:] = key[..., :100]
    gradients = [grad_output, torch.randn(2, 1, 11, 14)]
    mask = torch.zeros(2, 200, dtype=torch.bool)
    inputs = [query, key, value]
    exact = results_of_all(eager, [t.double() for t in inputs], [g.double() for g in gradients], mask, 1.0)

    def function(*tensors):
        return position_attention(*tensors[:4], return_logsumexp=True)

    moved = on(kernels.device, inputs), on(kernels.device, gradients)
    for name, g, x in zip(NAMES, results_of_all(function, *moved, mask, 1.0), exact, strict=True):
        error = (g.double() - x).norm() / x.norm()
        assert error < 1e-6, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    "needs", [[True, False, False], [False, True, False], [False, False, True], [True, False, True]]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_needs_input_grad(kernels, dtype, needs):
    inputs, gradients = make((2, 8, 16, (5, 7), (5, 7)), dtype)
    query, key, value, grad_output = on(kernels.device, [*inputs, gradients[0]])
    _, logsumexp, low = position_attention_partial(query, key, value, SCALE)
    call = functools.partial(gradients_of_part, grad_output, query, key, value, logsumexp, low, low + 0.1, SCALE)
    for needed, got, expected in zip(needs, call(needs_input_grad=needs), call(), strict=True):
        assert torch.equal(got, expected if needed else expected.new_empty(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_run_gives_the_same_bits(kernels, dtype):
    inputs, gradients = make((2, 33, 70, (13, 29), (37, 19)), dtype)
    runs = [results_of_parts(on(kernels.device, inputs), on(kernels.device, gradients), 3) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autograd(backend, dtype):
    """The derivative of one part's output and logsumexp, which the definition has too."""
    (query, key, value), (grad_output, grad_logsumexp) = make((2, 8, 16, (5, 7), (40,)), dtype)
    accumulation = accumulation_dtype(dtype)
    given = [grad_output.to(accumulation), grad_logsumexp.squeeze(1)]

    def gradients(function, tensors, given):
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = function(*leaves, SCALE)
        assert not outputs[2].requires_grad
        return [g.cpu() for g in torch.autograd.grad(outputs[:2], leaves, [g.to(outputs[0]) for g in given])]

    got = gradients(position_attention_partial, on(backend.device, [query, key, value]), on(backend.device, given))
    expected = gradients(reference.position_attention_partial, [query, key, value], given)
    exact = gradients(reference.position_attention_partial, [t.double() for t in (query, key, value)], given)
    for name, g, e, x in zip(NAMES[2:], got, expected, exact, strict=True):
        assert_as_exact_as_eager(name, g, e, x)


@pytest.mark.parametrize("used", [0, 1])
def test_autograd_of_one_result(backend, used):
    (query, key, value), _ = make((2, 8, 16, (5, 7), (40,)), torch.float64)
    leaves = [t.to(backend.device).requires_grad_() for t in (query, key, value)]

    def call(*tensors):
        return position_attention_partial(*tensors, SCALE)[used]

    assert torch.autograd.gradcheck(lambda *t: call(*t)[:, :2], [t[..., :3].detach().requires_grad_() for t in leaves])


def test_the_logsumexp_does_not_depend_on_the_values(backend):
    """Its gradient is finite where values are not, and that of the values is 0."""
    (query, key, value), _ = make((2, 8, 16, (5, 7), (40,)), torch.float64)
    value[0, :, 3] = torch.inf
    leaves = [t.to(backend.device).requires_grad_() for t in (query, key, value)]
    weight = torch.randn(2, 5, 7, dtype=torch.float64)
    logsumexp = position_attention_partial(*leaves, SCALE)[1]
    got = torch.autograd.grad(logsumexp, leaves, weight.to(logsumexp), materialize_grads=True)
    energies = SCALE * torch.einsum("bes,bet->bst", query.flatten(2), key.flatten(2))
    expected = torch.autograd.grad(energies.logsumexp(2), (query, key), weight.flatten(1))
    for g, want in zip(got, (*expected, torch.zeros_like(value)), strict=True):
        torch.testing.assert_close(g.cpu(), want, rtol=1e-10, atol=1e-12)


def test_opcheck(kernels):
    (query, key, value), (grad_output, grad_logsumexp) = make((2, 8, 6, (3, 4), (5,)), torch.float32)
    tensors = on(kernels.device, [query, key, value])
    mask = torch.zeros(2, 5, dtype=torch.bool, device=kernels.device)
    mask[1, 3:] = True
    operator = kernels.operators.position_attention_partial.default
    leaves = [t.requires_grad_() for t in tensors]
    for padding in (None, mask):
        torch.library.opcheck(operator, (*leaves, 0.5, padding))
    _, logsumexp, low = operator(*(t.detach() for t in tensors), 0.5)
    torch.library.opcheck(
        kernels.operators.position_attention_partial_backward.default,
        (grad_output.to(kernels.device), *(t.detach() for t in tensors), logsumexp, low, low, 0.5, [True] * 3, mask),
    )


def test_fake_results_of_16_bits(kernels):
    """Results and gradients are in the dtype of accumulation."""
    (query, key, value), (grad_output, _) = make((2, 8, 6, (3, 4), (5,)), torch.bfloat16)
    tensors = on(kernels.device, [query, key, value])
    forward = kernels.operators.position_attention_partial.default
    _, logsumexp, low = forward(*tensors, 0.5)
    arguments = (grad_output.to(kernels.device), *tensors, logsumexp, low, low, 0.5)
    torch.library.opcheck(forward, (*tensors, 0.5), test_utils="test_faketensor")
    backward = kernels.operators.position_attention_partial_backward.default
    torch.library.opcheck(backward, arguments, test_utils="test_faketensor")


def test_vmap(kernels):
    (query, key, value), _ = make((3, 8, 6, (3, 4), (5,)), torch.float32)
    tensors = [t.unsqueeze(1) for t in on(kernels.device, [query, key, value])]
    got = torch.vmap(lambda *t: position_attention_partial(*t, 0.5))(*tensors)
    expected = position_attention_partial(*(t.squeeze(1) for t in tensors), 0.5)
    assert all(torch.equal(g.squeeze(1), e) for g, e in zip(got, expected, strict=True))


def test_compiled(kernels):
    (query, key, value), _ = make((2, 8, 6, (3, 4), (5,)), torch.float32)
    tensors = [t.to(kernels.device).requires_grad_() for t in (query, key, value)]

    def call(*t):
        output, logsumexp, _ = position_attention_partial(*t, 0.5)
        return output.square().sum() + logsumexp.sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    got, expected = (torch.autograd.grad(f(*tensors), tensors) for f in (compiled, call))
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


def test_second_derivatives_are_refused(kernels):
    tensors = [t.to(kernels.device).requires_grad_() for t in make((1, 4, 4, (3,), (3,)), torch.float32)[0]]
    output = position_attention_partial(*tensors)[0]
    (gradient,) = torch.autograd.grad(output.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="position_attention_partial_backward: the operator has no second"):
        gradient.sum().backward()


def test_arguments_that_are_no_tensors():
    x = torch.zeros(1, 2, 3)
    with pytest.raises(TypeError, match=r"position_attention_partial: key must be a torch.Tensor \(got list\)"):
        position_attention_partial(x, [1.0], x)
    with pytest.raises(TypeError, match="position_attention_partial: scale must be a number"):
        position_attention_partial(x, x, x, "1")
