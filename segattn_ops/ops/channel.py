"""Channel attention: softmax attention between channels, contracted over positions."""

import math

import torch
from torch import Tensor

from .. import _backend, reference
from ._check import Arguments, accumulation_dtype, fail
from ._register import autocast, register_flops, register_once_differentiable, register_vmap


def channel_attention(query: Tensor, key: Tensor, value: Tensor, scale: float = -1.0) -> Tensor:
    r"""Attention between channels: ``A = softmax_k(scale * sum_n q_cn k_kn)``, ``out_c = sum_k A_ck v_k``.

    With ``query = key = value = x`` (the same tensor) and scale -1 this is DANet's channel attention module, whose
    ``softmax(max(E) - E)`` is a softmax of -E; its energy is symmetric, and half of it is computed. Energies are
    float32 for float16 and bfloat16 inputs: they would overflow float16.

    Args:
        query: (B, C, *S), float16, bfloat16, float32 or float64. Any strides; contiguous is fastest.
        key: (B, K, *S), at least one position.
        value: (B, K, *T). T may differ from S.
        scale: multiplies the energies. Not differentiable.

    Returns:
        (B, C, *T), in the inputs' dtype.

    Raises:
        RuntimeError: for mismatched shapes, dtypes or devices, and for a scale that is not finite.

    Source: Fu et al., "Dual Attention Network for Scene Segmentation" (2019), equations 3 and 4, and the sign of the
    authors' code.
    """
    if query is key and key is value:
        return _self_attention(*autocast(query), scale)
    query, key, value = autocast(query, key, value)
    operators = _backend.operators(query.device)
    if operators is None:
        _check(query, key, value, scale)
        return _backend.call_reference(reference.channel_attention, query, key, value, scale)[0]
    return operators.channel_attention(query, key, value, scale)[0]


def residual_channel_attention(input: Tensor, gamma: Tensor, scale: float = -1.0) -> Tensor:
    r"""DANet's channel attention module whole: ``gamma * channel_attention(x, x, x, scale) + x`` in one op.

    gamma multiplies the C x C map, and the residual is added where results are stored. Nothing of the input's size is
    saved but the input: the gradient of gamma is ``sum(A * dA)``.

    Args:
        input: (B, C, *S), float16, bfloat16, float32 or float64; at least one position.
        gamma: the factor, floating point: (), (1,), (C,) or (B, C), whatever broadcasts to (B, C). It is used in the
            dtype of accumulation.
        scale: multiplies the energies. Not differentiable.

    Returns:
        (B, C, *S), in the dtype of the input. (Under autocast an input that autocast would convert keeps its dtype,
        and its residual is not rounded.)

    Raises:
        RuntimeError: for an input of the wrong rank or dtype, a gamma of the wrong shape, dtype or device, and for a
            scale that is not finite.

    Source: Fu et al. (2019), equations 3 and 4, beta being our gamma, as in the authors' code.
    """
    _check_self(input, scale, op="residual_channel_attention")
    factors = _factors(input, gamma)
    (converted,) = autocast(input)
    if converted.dtype != input.dtype:
        attended = _self_attention(converted, scale)
        return factors.reshape(*factors.shape, *[1] * (input.dim() - 2)) * attended + input
    return _self_attention(input, scale, factors)


def _factors(x: Tensor, gamma: Tensor) -> Tensor:
    """gamma as the op wants it: (B, C), in the dtype of accumulation."""
    arguments = Arguments("residual_channel_attention", input=x, gamma=gamma)
    arguments.same_device("gamma", "input")
    arguments.dtype("gamma")
    sizes = x.shape[:2]
    if gamma.dim() > 2 or any(g not in (1, s) for g, s in zip(reversed(gamma.shape), reversed(sizes), strict=False)):
        rule = f"must be of a shape that broadcasts to (batch, channels) = {list(sizes)}"
        fail("residual_channel_attention", f"gamma {rule} (got shape {list(gamma.shape)})")
    return gamma.to(accumulation_dtype(x.dtype)).expand(sizes)


def _self_attention(x: Tensor, scale: float, gamma: Tensor | None = None) -> Tensor:
    operators = _backend.operators(x.device)
    if operators is None:
        _check_self(x, scale, gamma)
        return _backend.call_reference(reference.channel_self_attention, x, scale, gamma)[0]
    return operators.channel_self_attention(x, scale, gamma)[0]


def _check(query: Tensor, key: Tensor, value: Tensor, scale: float, op: str = "channel_attention") -> None:
    arguments = Arguments(op, query=query, key=key, value=value)
    arguments.dtype("query")
    for name in ("key", "value"):
        arguments.like(name, "query")
    for name in ("query", "key", "value"):
        arguments.feature_map(name)
    for name in ("query", "key"):
        arguments.has_channels(name)
    for name in ("key", "value"):
        arguments.batch(name, "query")
    arguments.spatial("key", "query")
    arguments.channels("value", "key")
    arguments.has_positions("query")
    arguments.scale(scale)


def _check_self(x: Tensor, scale: float, gamma: Tensor | None = None, op: str = "channel_self_attention") -> None:
    arguments = Arguments(op, input=x, gamma=gamma)
    arguments.dtype("input")
    arguments.feature_map("input")
    arguments.has_channels("input")
    arguments.has_positions("input")
    arguments.scale(scale)
    if gamma is not None:
        arguments.same_device("gamma", "input")
        arguments.dtype_is("gamma", accumulation_dtype(x.dtype), "for these inputs")
        arguments.shape_is("gamma", tuple(x.shape[:2]))


def _fake(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    _check(query, key, value, scale)
    output = query.new_empty((*query.shape[:2], *value.shape[2:]))
    return output, query.new_empty(query.shape[:2], dtype=accumulation_dtype(query.dtype))


def _fake_backward(grad_output, query, key, value, scale):
    _check(query, key, value, scale, "channel_attention_backward")
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _fake_self(x: Tensor, scale: float, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
    _check_self(x, scale, gamma)
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=accumulation_dtype(x.dtype))


def _fake_self_backward(grad_output, x, scale, gamma=None):
    _check_self(x, scale, gamma, "channel_self_attention_backward")
    return x.new_empty(x.shape), x.new_empty(x.shape[:2], dtype=accumulation_dtype(x.dtype))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def _setup_self_context(ctx, inputs, output) -> None:
    x, ctx.scale, gamma = inputs
    ctx.save_for_backward(x, gamma)
    ctx.mark_non_differentiable(output[1])


def _flops(query, key, value) -> int:
    """The energy over the positions of query and the application over those of value."""
    return 2 * query[0] * query[1] * key[1] * (math.prod(query[2:]) + math.prod(value[2:]))


def _flops_backward(grad_output, query, key, value) -> int:
    """The energy again, two products over the positions of query (to its gradient and key's), two over value's."""
    return 2 * query[0] * query[1] * key[1] * (3 * math.prod(query[2:]) + 2 * math.prod(value[2:]))


def _flops_self(x, gamma=None) -> int:
    """Half of the symmetric energy, and its application."""
    return 3 * x[0] * x[1] ** 2 * math.prod(x[2:])


def _flops_self_backward(grad_output, x, gamma=None) -> int:
    """Half of the energy again, dA = dO x^T, then A^T dO and (dE + dE^T) x."""
    return 7 * x[0] * x[1] ** 2 * math.prod(x[2:])


def register(namespace: str) -> None:
    """Registers the Python side of the family's operators in `namespace`."""
    operators = getattr(torch.ops, namespace)

    def backward(ctx, grad_output, grad_logsumexp):
        return *operators.channel_attention_backward(grad_output, *ctx.saved_tensors, ctx.scale), None

    def self_backward(ctx, grad_output, grad_logsumexp):
        x, gamma = ctx.saved_tensors
        grad_input, grad_gamma = operators.channel_self_attention_backward(grad_output, x, ctx.scale, gamma)
        return grad_input, None, None if gamma is None else grad_gamma

    name, self_name = f"{namespace}::channel_attention", f"{namespace}::channel_self_attention"
    torch.library.register_fake(name, _fake)
    torch.library.register_fake(f"{name}_backward", _fake_backward)
    torch.library.register_fake(self_name, _fake_self)
    torch.library.register_fake(f"{self_name}_backward", _fake_self_backward)
    torch.library.register_autograd(name, backward, setup_context=_setup_context)
    torch.library.register_autograd(self_name, self_backward, setup_context=_setup_self_context)
    for op in (name, self_name):
        register_once_differentiable(f"{op}_backward")
        register_vmap(op)
        register_vmap(f"{op}_backward")
    register_flops(operators.channel_attention, _flops)
    register_flops(operators.channel_attention_backward, _flops_backward)
    register_flops(operators.channel_self_attention, _flops_self)
    register_flops(operators.channel_self_attention_backward, _flops_self_backward)
