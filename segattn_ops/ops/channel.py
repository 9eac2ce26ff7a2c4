"""Channel attention: softmax attention between channels, contracted over positions."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import _backend, reference
from .._autocast import autocast, without_autocast
from ._check import (
    SUPPORTED,
    Argument,
    accumulation_dtype,
    check_batch,
    check_channels,
    check_dtype,
    check_dtype_is,
    check_feature_map,
    check_has_channels,
    check_has_positions,
    check_like,
    check_needs_input_grad,
    check_same_device,
    check_scale,
    check_shape,
    check_shape_is,
    check_spatial,
    check_tensors,
    fail,
    number,
)
from ._derivatives import channel as _derivatives
from ._memory_format import like_inputs
from ._register import Operator, channels_of_products, empty_gradients, wanted


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
        (B, C, *T), in the inputs' dtype, and in channels_last if query or value is.

    Raises:
        TypeError: for an argument that is not a tensor, and for a scale that is not a number.
        RuntimeError: for mismatched shapes, dtypes or devices, and for a scale that is not finite.

    Source: Fu et al., "Dual Attention Network for Scene Segmentation" (2019), equations 3 and 4, and the sign of the
    authors' code.
    """
    if has_torch_function((query, key, value)):
        overridden: Tensor = handle_torch_function(channel_attention, (query, key, value), query, key, value, scale)
        return overridden
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        check_tensors("channel_attention", query=query, key=key, value=value)
    if type(scale) is not float:
        scale = number("channel_attention", "scale", scale)
    if query is key and key is value:
        (x,) = autocast(query)
        return like_inputs(_self_attention(x, scale), query)
    query, key, value = autocast(query, key, value)
    operators = _backend.operators("channel_attention", query, key, value)
    if operators is None:
        check_channel_attention(query, key, value, scale)
        with without_autocast(query.device.type):
            results = reference.channel_attention(query, key, value, scale)
    else:
        results = operators.channel_attention(query, key, value, scale)
    return like_inputs(results[0], query, value)


def residual_channel_attention(input: Tensor, gamma: Tensor | float, scale: float = -1.0) -> Tensor:
    r"""DANet's channel attention module: ``gamma * channel_attention(x, x, x, scale) + x`` in one op.

    gamma multiplies the C x C attention map, and the residual is added where the result is stored. The input is the
    only tensor of its size that is saved: the gradient of gamma is ``sum(A * dA)``.

    Args:
        input: (B, C, *S), float16, bfloat16, float32 or float64; at least one position.
        gamma: the factor: a number, or a floating-point tensor of shape (), (1,), (C,), (B, C) or another that
            broadcasts to (B, C). It is used in the dtype of accumulation.
        scale: multiplies the energies. Not differentiable.

    Returns:
        (B, C, *S), in the dtype and memory format of the input. Under autocast as well: the attention is computed in
        autocast's dtype, the residual is not rounded.

    Raises:
        TypeError: for an input that is not a tensor, a gamma that is neither a number nor a tensor, and a scale that is
            not a number.
        RuntimeError: for an input of the wrong rank or dtype, a gamma of the wrong shape, dtype or device, and for a
            scale that is not finite.

    Source: Fu et al. (2019), equations 3 and 4, beta being our gamma, as in the authors' code.
    """
    if has_torch_function((input, gamma)):
        overridden: Tensor = handle_torch_function(residual_channel_attention, (input, gamma), input, gamma, scale)
        return overridden
    if not isinstance(input, Tensor):
        check_tensors("residual_channel_attention", input=input)
    if type(scale) is not float:
        scale = number("residual_channel_attention", "scale", scale)
    if not (input.dtype in SUPPORTED and input.dim() >= 3 and input.numel() > 0 and -math.inf < scale < math.inf):
        check_channel_self_attention(input, scale, None, "residual_channel_attention")
    factors = channel_factors("residual_channel_attention", input, gamma)
    (converted,) = autocast(input)
    if converted.dtype != input.dtype:
        attended = _self_attention(converted, scale)
        output = (factors.reshape(*factors.shape, *[1] * (input.dim() - 2)) * attended + input).to(input.dtype)
    else:
        output = _self_attention(input, scale, factors)
    return like_inputs(output, input)


def channel_factors(op: str, x: Tensor, gamma: Tensor | float) -> Tensor:
    """gamma as the operators take it: (B, C), in the dtype of accumulation."""
    dtype = accumulation_dtype(x.dtype)
    if not isinstance(gamma, Tensor):
        if isinstance(gamma, bool) or not isinstance(gamma, numbers.Real):
            raise TypeError(f"{op}: gamma must be a number or a torch.Tensor (got {type(gamma).__name__})")
        return x.new_full(x.shape[:2], number(op, "gamma", gamma), dtype=dtype)
    sizes = x.shape[:2]
    if gamma.dtype is dtype and gamma.shape == (1,) and gamma.device == x.device:
        return gamma.expand(sizes)
    check_same_device(op, Argument("gamma", gamma), Argument("input", x))
    check_dtype(op, Argument("gamma", gamma))
    if gamma.dim() > 2 or any(g not in (1, s) for g, s in zip(reversed(gamma.shape), reversed(sizes), strict=False)):
        rule = f"must be of a shape that broadcasts to (batch, channels) = {list(sizes)}"
        fail(op, f"gamma {rule} (got shape {list(gamma.shape)})")
    return gamma.to(dtype).expand(sizes)


def _self_attention(x: Tensor, scale: float, gamma: Tensor | None = None) -> Tensor:
    if gamma is None:
        operators = _backend.operators("channel_attention", x)
    else:
        operators = _backend.operators("residual_channel_attention", x, gamma)
    if operators is None:
        check_channel_self_attention(x, scale, gamma)
        with without_autocast(x.device.type):
            results = reference.channel_self_attention(x, scale, gamma)
    else:
        results = operators.channel_self_attention(x, scale, gamma)
    return results[0]


def check_channel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    op: str = "channel_attention",
    positions_may_be_empty: bool = False,
) -> None:
    """query (B, C, *S), key (B, K, *S), value (B, K, *T)."""
    q, k, v = Argument("query", query), Argument("key", key), Argument("value", value)
    check_dtype(op, q)
    check_like(op, k, q)
    check_like(op, v, q)
    check_feature_map(op, q)
    check_feature_map(op, k)
    check_feature_map(op, v)
    check_has_channels(op, q)
    check_has_channels(op, k)
    check_batch(op, k, q)
    check_batch(op, v, q)
    check_spatial(op, k, q)
    check_channels(op, v, k)
    if not positions_may_be_empty:
        check_has_positions(op, q)
    check_scale(op, scale)


def check_channel_attention_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, scale: float, needs_input_grad: Sequence[bool]
) -> None:
    """grad_output (B, C, *T), query (B, C, *S), key (B, K, *S), value (B, K, *T)."""
    op = "channel_attention_backward"
    check_channel_attention(query, key, value, scale, op)
    g, q, v = Argument("grad_output", grad_output), Argument("query", query), Argument("value", value)
    check_like(op, g, q)
    check_feature_map(op, g)
    check_batch(op, g, q)
    check_channels(op, g, q)
    check_spatial(op, g, v)
    check_needs_input_grad(op, needs_input_grad, 3)


def check_channel_self_attention(
    input: Tensor,
    scale: float,
    gamma: Tensor | None,
    op: str = "channel_self_attention",
    positions_may_be_empty: bool = False,
) -> None:
    """input (B, C, *S), gamma (B, C)."""
    x = Argument("input", input)
    check_dtype(op, x)
    check_feature_map(op, x)
    check_has_channels(op, x)
    if not positions_may_be_empty:
        check_has_positions(op, x)
    check_scale(op, scale)
    if gamma is not None:
        g = Argument("gamma", gamma)
        check_same_device(op, g, x)
        check_dtype_is(op, g, accumulation_dtype(input.dtype), "for these inputs")
        check_shape_is(op, g, input.shape[:2])


def check_channel_self_attention_backward(
    grad_output: Tensor, input: Tensor, scale: float, gamma: Tensor | None, needs_input_grad: Sequence[bool]
) -> None:
    """grad_output (B, C, *S), input (B, C, *S), gamma (B, C)."""
    op = "channel_self_attention_backward"
    check_channel_self_attention(input, scale, gamma, op)
    g, x = Argument("grad_output", grad_output), Argument("input", input)
    check_like(op, g, x)
    check_shape(op, g, x)
    check_needs_input_grad(op, needs_input_grad, 2)


def _fake(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    check_channel_attention(query, key, value, scale)
    output = query.new_empty((*query.shape[:2], *value.shape[2:]))
    return output, query.new_empty(query.shape[:2], dtype=accumulation_dtype(query.dtype))


def _fake_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    needs_input_grad: Sequence[bool] = (True, True, True),
) -> list[Tensor]:
    check_channel_attention_backward(grad_output, query, key, value, scale, needs_input_grad)
    return empty_gradients((query, key, value), needs_input_grad)


def _fake_self(input: Tensor, scale: float, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check_channel_self_attention(input, scale, gamma)
    return input.new_empty(input.shape), input.new_empty(input.shape[:2], dtype=accumulation_dtype(input.dtype))


def _fake_self_backward(
    grad_output: Tensor,
    input: Tensor,
    scale: float,
    gamma: Tensor | None = None,
    needs_input_grad: Sequence[bool] = (True, True),
) -> list[Tensor]:
    check_channel_self_attention_backward(grad_output, input, scale, gamma, needs_input_grad)
    factors = input.new_empty(input.shape[:2], dtype=accumulation_dtype(input.dtype))
    return empty_gradients((input, factors), needs_input_grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def _setup_self_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.scale, gamma = inputs
    ctx.save_for_backward(x, gamma)
    ctx.mark_non_differentiable(output[1])


def _backward(operator: Any, ctx: Any, grad_output: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
    inputs, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:3])
    return *wanted(operator(grad_output, *inputs, ctx.scale, needs), needs, inputs), None


def _self_backward(operator: Any, ctx: Any, grad_output: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
    x, gamma = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], gamma is not None and ctx.needs_input_grad[2]]
    grad_input, grad_gamma = wanted(operator(grad_output, x, ctx.scale, gamma, needs), needs, (x,))
    return grad_input, None, grad_gamma


def _flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    """The energy over the positions of query and the weighted sum over those of value."""
    return 2 * query[0] * query[1] * key[1] * (math.prod(query[2:]) + math.prod(value[2:]))


def _flops_backward(
    grad_output: Any,
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    needs_input_grad: Sequence[bool] = (True, True, True),
) -> int:
    """Over the positions of query the energy again, grad_query and grad_key; over those of value two products."""
    positions = channels_of_products(math.prod(query[2:]), math.prod(value[2:]), needs_input_grad)
    return 2 * query[0] * query[1] * key[1] * positions


def _flops_self(x: Sequence[int], gamma: Any = None) -> int:
    """Half of the symmetric energy, and the weighted sum."""
    return 3 * x[0] * x[1] ** 2 * math.prod(x[2:])


def _flops_self_backward(
    grad_output: Any, x: Sequence[int], gamma: Any = None, needs_input_grad: Sequence[bool] = (True, True)
) -> int:
    """Half of the energy again, dA = dO x^T, then, for the input, A^T dO and (dE + dE^T) x."""
    products = 7 if needs_input_grad[0] else 3 if needs_input_grad[1] else 0
    return products * x[0] * x[1] ** 2 * math.prod(x[2:])


OPERATORS = (
    Operator(
        "channel_attention",
        fake=_fake,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        backward=_backward,
        jvp=_derivatives.jvp,
        backward_jvp=_derivatives.backward_jvp,
        double_backward=_derivatives.double_backward,
        flops=_flops,
        flops_backward=_flops_backward,
    ),
    Operator(
        "channel_self_attention",
        fake=_fake_self,
        fake_backward=_fake_self_backward,
        setup_context=_setup_self_context,
        backward=_self_backward,
        jvp=_derivatives.self_jvp,
        backward_jvp=_derivatives.self_backward_jvp,
        double_backward=_derivatives.self_double_backward,
        flops=_flops_self,
        flops_backward=_flops_self_backward,
    ),
)


def channel_energy(query, key=None):
    return reference.channel_energy(query, key)


def channel_apply(energy, value, scale, gamma=None):
    return reference.channel_apply(energy, value, scale, gamma)[0]
