"""The formulas in plain PyTorch, in any dtype, and the error that a call may have."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from segattn_ops.ops._check import accumulation_dtype

from ..families import eager_affinity, eager_aggregation
from ..tolerance import FLOOR, FLOOR_FLOAT64
from .calls import ARGUMENTS, Call, Data, differentiated


@dataclass(frozen=True)
class Form:
    """Energies are `products` of query and key, the output `sums` of value, both linear in each argument; the softmax
    is over dimension `keys` of the energies."""

    keys: int
    products: Callable[[Tensor, Tensor], Tensor]
    sums: Callable[[Tensor, Tensor], Tensor]


POSITION = Form(
    2,
    lambda q, k: torch.bmm(q.flatten(2).mT, k.flatten(2)),
    lambda weights, v: torch.bmm(v.flatten(2), weights.mT),
)
CHANNEL = Form(
    2,
    lambda q, k: torch.bmm(q.flatten(2), k.flatten(2).mT),
    lambda weights, v: torch.bmm(weights, v.flatten(2)),
)
CRISS_CROSS = Form(1, eager_affinity, eager_aggregation)


def form_of(op: str) -> Form:
    if op.startswith("criss_cross"):
        return CRISS_CROSS
    return POSITION if op == "position_attention" else CHANNEL


def _per_channel(gamma: Tensor, like: Tensor) -> Tensor:
    return gamma.reshape(*gamma.shape, *(1,) * (like.dim() - 2))


def _softmax(energy: Tensor, keys: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and logsumexp. mask (B, M)"""
    if mask is None:
        return energy.softmax(keys), energy.logsumexp(keys)
    padding = mask.unsqueeze(1)
    only_padding = padding.all(2, keepdim=True)
    energy = energy.masked_fill(padding & ~only_padding, -torch.inf)
    weights = energy.softmax(2).masked_fill(only_padding, 0)
    return weights, energy.logsumexp(2).masked_fill(only_padding.squeeze(2), -torch.inf)


def _mask_of_heads(call: Call, mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.flatten(1).repeat_interleave(call.heads, 0)


def _split(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(1, (heads, -1)).flatten(0, 1) if heads > 1 else t


def formula(call: Call, mask: Tensor | None = None) -> Callable[..., tuple[Tensor, ...]]:
    """The op, of the tensors: its results as a tuple."""
    form = form_of(call.op)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (_split(t, call.heads) for t in (query, key, value))
        weights, logsumexp = _softmax(call.scale * form.products(q, k), form.keys, _mask_of_heads(call, mask))
        spatial = value.shape[2:] if form is CHANNEL else query.shape[2:]
        channels = query.shape[1] if form is CHANNEL else value.shape[1]
        output = form.sums(weights, v).reshape(query.shape[0], channels, *spatial)
        if not call.with_logsumexp:
            return (output,)
        return output, logsumexp.reshape(query.shape[0], call.heads, *query.shape[2:])

    return {
        "channel_self_attention": lambda x: attention(x, x, x),
        "residual_channel_attention": lambda x, gamma: (_per_channel(gamma, x) * attention(x, x, x)[0] + x,),
        "criss_cross_affinity": lambda q, k: (form.products(q, k),),
        "criss_cross_aggregation": lambda a, v: (form.sums(a, v),),
    }.get(call.op, attention)


def expected(call: Call, data: Data, dtype: torch.dtype) -> dict[str, Tensor]:
    """The formula's results in a dtype."""
    converted = data.changed(
        grad_output=data.grad_output.to(dtype),
        grad_logsumexp=None if data.grad_logsumexp is None else data.grad_logsumexp.to(accumulation_dtype(dtype)),
    )
    return differentiated(call, formula(call, data.mask), [t.to(dtype) for t in data.clean], converted)


def _gradients(result: Tensor, inputs: list[Tensor], given: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(result, inputs, given))


@dataclass(frozen=True)
class Magnitudes:
    """The largest sum of magnitudes behind each result: sums[name], in which differences are sums. Rounding moves a
    result by some units in the last place of this sum, however small the result is. `energy`: the same of the
    energies. `steps`: the largest sum of the factors of weights and of the gradients of energies, which multiplies
    their smallest representable step. `intermediate`: the largest gradient of an energy or a weight."""

    sums: dict[str, float]
    energy: float
    steps: dict[str, float]
    intermediate: float


def _largest(t: Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def magnitudes(call: Call, data: Data) -> Magnitudes:
    form = form_of(call.op)
    inputs = [t.double() for t in data.clean]
    g = data.grad_output.double().abs()
    if call.op == "criss_cross_affinity" or call.op == "criss_cross_aggregation":
        leaves = [t.abs().requires_grad_() for t in inputs]
        result = (form.products if call.op == "criss_cross_affinity" else form.sums)(*leaves)
        found = {"output": result.detach()}
        names = [f"grad_{name}" for name in ARGUMENTS[call.op]]
        found |= dict(zip(names, _gradients(result, leaves, g), strict=True))
        return Magnitudes({name: _largest(t) for name, t in found.items()}, 0.0, {}, 0.0)
    query, key, value = (_split(t, call.heads) for t in (inputs if len(inputs) == 3 else [inputs[0]] * 3))
    mask = _mask_of_heads(call, data.mask)
    weights, _ = _softmax(call.scale * form.products(query, key), form.keys, mask)
    q, k, v = (t.abs().requires_grad_() for t in (query, key, value))
    factor = 1.0
    gamma = inputs[1].abs() if call.op == "residual_channel_attention" else None
    products = form.products(q, k)
    energy = abs(call.scale) * products.detach()
    if mask is not None:
        energy = energy.masked_fill(mask.unsqueeze(1), 0)
    leaf = weights.clone().requires_grad_()
    sums = form.sums(leaf, v)
    gradient = (g if gamma is None else _per_channel(gamma, g) * g).reshape(sums.shape)
    of_weights, grad_value = _gradients(sums, [leaf, v], gradient)
    delta = (weights * of_weights).sum(form.keys, keepdim=True)
    of_energies = weights * (of_weights + delta)
    if data.grad_logsumexp is not None:
        given = data.grad_logsumexp.double().abs()
        shape = list(energy.shape)
        shape[form.keys] = 1
        of_energies = of_energies + weights * given.reshape(shape)
    of_energies = abs(call.scale) * of_energies
    grad_query, grad_key = _gradients(form.products(q, k), [q, k], of_energies)
    output = sums.detach()
    is_kept = torch.ones_like(weights)
    if mask is not None:
        is_kept = is_kept.masked_fill(mask.unsqueeze(1), 0)
    query_steps, key_steps = _gradients(form.products(q, k), [q, k], is_kept)
    output_steps = form.sums(is_kept, v).detach()
    (value_steps,) = _gradients(form.sums(is_kept, v), [v], gradient)
    steps = {"output": output_steps, "grad_query": query_steps, "grad_key": key_steps, "grad_value": value_steps}
    found = {"output": output, "grad_query": grad_query, "grad_key": grad_key, "grad_value": grad_value}
    intermediate = max(_largest(of_energies), _largest(of_weights))
    if len(inputs) < 3:
        together = grad_query + grad_key + grad_value
        steps = {"output": output_steps, "grad_input": query_steps + key_steps + value_steps}
        found = {"output": output, "grad_input": together.reshape(inputs[0].shape)}
        if gamma is not None:
            factor = _per_channel(gamma, g)
            found["output"] = factor * output.reshape(g.shape) + inputs[0].abs()
            found["grad_input"] = found["grad_input"] + g
            found["grad_gamma"] = (g * output.reshape(g.shape)).flatten(2).sum(2)
    largest_energy = _largest(energy)
    return Magnitudes(
        {name: _largest(t) for name, t in found.items()} | {"logsumexp": max(1.0, largest_energy)},
        largest_energy,
        {name: _largest(t) for name, t in steps.items()},
        intermediate,
    )


# Units in the last place of the dtype of accumulation, of the sum of magnitudes: the roundings of sums, which eager
# PyTorch has too, but by chance not in a result of few elements.
FLOOR_OF_SUMS = 16


def floor(call: Call, name: str, result: Tensor, exact: Tensor, sizes: Magnitudes) -> float:
    """The part of the bound that does not depend on eager's error. That of tests/tolerance.py, and what a result needs
    that has few elements or is far below the terms of its sums: units of these terms in the dtype of accumulation, and
    the smallest steps of 16-bit intermediate results."""
    dtype, accumulation = call.torch_dtype, accumulation_dtype(call.torch_dtype)
    rounded = torch.finfo(result.dtype)
    eps = torch.finfo(accumulation).eps
    total = sizes.sums[name]
    largest = _largest(exact[exact.isfinite()])
    allowed = (FLOOR_FLOAT64 if dtype == torch.float64 else FLOOR) * rounded.eps * largest
    allowed += (sizes.energy + FLOOR_OF_SUMS) * eps * total
    if dtype == torch.float64:
        # No wider type says what eager's error is. A sum of equal terms rounds in the same direction in every step: 88
        # units for 1025 terms.
        allowed += max(torch.Size(shape[2:]).numel() for shape in call.shapes) / 4 * eps * total
    if dtype.itemsize == 2:
        # The rounding errors of the output are kept in the dtype, and weights and their gradients are rounded to it.
        allowed += 2 * torch.finfo(dtype).eps ** 2 * total
        allowed += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps * sizes.steps.get(name, 0.0)
        if call.op == "criss_cross_attention" and name == "grad_key":
            # Delta comes from the rounded output, and its error has the same sign in all queries of a region
            # (docs/decisions.md, "What remains").
            allowed += torch.finfo(dtype).eps / 4 * total
    # The CPU kernels' exp is 0 below the smallest normal number.
    allowed += torch.finfo(accumulation).smallest_normal * sizes.steps.get(name, 0.0) * max(1.0, sizes.intermediate)
    return allowed + rounded.smallest_normal * rounded.eps


def assert_exact(call: Call, got: dict[str, Tensor], data: Data) -> None:
    """Every result is as exact as eager's: tests/tolerance.py, with the floor above."""
    eager = expected(call, data, call.torch_dtype)
    exact = expected(call, data, torch.float64)
    sizes = magnitudes(call, data)
    assert got.keys() == exact.keys()
    largest = torch.finfo(call.torch_dtype).max
    for name, result in got.items():
        true = exact[name]
        assert result.shape == true.shape, f"{name}: shape {list(result.shape)}, expected {list(true.shape)}"
        dtype = accumulation_dtype(call.torch_dtype) if name == "logsumexp" else call.torch_dtype
        assert result.dtype == dtype, f"{name}: {result.dtype}, expected {dtype}"
        if true.numel() == 0:
            continue
        if sizes.sums[name] > largest / 4 or (name.startswith("grad") and sizes.intermediate > largest / 4):
            continue  # beyond the range of float16, in eager PyTorch too
        assert torch.equal(result.isfinite(), true.isfinite()), f"{name}: not finite where the exact result is"
        finite = true.isfinite()
        assert torch.equal(result.double()[~finite], true[~finite]), f"{name}: another infinity"
        if not finite.any():
            continue
        error = _largest(result.double()[finite] - true[finite])
        eager_error = _largest((eager[name].double() - true)[finite].nan_to_num(0, 0, 0))
        allowed = floor(call, name, result, true, sizes)
        assert error <= 2 * eager_error + allowed, (
            f"{name}: error {error:.3e}, eager's {eager_error:.3e}, floor {allowed:.3e}, "
            f"largest {_largest(true[finite]):.3e}"
        )


def assert_same(
    call: Call, got: dict[str, Tensor], other: dict[str, Tensor], data: Data, more_energy: float = 0.0
) -> None:
    """Two computations of the same numbers, with roundings in another order. more_energy: of one of the two."""
    sizes = magnitudes(call, data)
    more = {"logsumexp": sizes.sums["logsumexp"] + more_energy} if "logsumexp" in sizes.sums else {}
    sizes = replace(sizes, energy=sizes.energy + more_energy, sums=sizes.sums | more)
    eps = torch.finfo(call.torch_dtype).eps
    assert got.keys() == other.keys()
    for name, result in got.items():
        assert result.shape == other[name].shape, name
        a, b = result.double(), other[name].double()
        limit = torch.finfo(call.torch_dtype).max / 4
        if sizes.sums[name] > limit or (name.startswith("grad") and sizes.intermediate > limit):
            continue
        allowed = 2 * floor(call, name, result, a, sizes)
        if name != "logsumexp":
            allowed += 2 * eps * sizes.sums[name]  # weights of 16 bits
        finite = a.isfinite()
        assert torch.equal(finite, b.isfinite()), f"{name}: not finite in one of the two"
        difference = _largest((a - b)[finite])
        assert difference <= allowed, f"{name}: difference {difference:.3e}, allowed {allowed:.3e}"


def assert_equal(got: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """To the bit, NaN included."""
    assert got.keys() == other.keys()
    for name, result in got.items():
        a, b = result, other[name]
        same = a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        assert same, f"{name}: other bits, by up to {_largest((a - b).nan_to_num()):.3e}"
