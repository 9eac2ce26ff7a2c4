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
    shape_of,
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
    factors = channel_factors("residual_channel_attention", gamma, Argument("input", input), input.shape[1])
    (converted,) = autocast(input)
    if converted.dtype != input.dtype:
        attended = _self_attention(converted, scale)
        output = (factors.reshape(*factors.shape, *[1] * (input.dim() - 2)) * attended + input).to(input.dtype)
    else:
        output = _self_attention(input, scale, factors)
    return like_inputs(output, input)


def channel_factors(op: str, gamma: Tensor | float, like: Argument, channels: int) -> Tensor:
    """gamma as the operators take it: (B, C), in the dtype of accumulation of the feature map `like`."""
    x = like.tensor
    dtype = accumulation_dtype(x.dtype)
    sizes = (x.shape[0], channels)
    if not isinstance(gamma, Tensor):
        if isinstance(gamma, bool) or not isinstance(gamma, numbers.Real):
            raise TypeError(f"{op}: gamma must be a number or a torch.Tensor (got {type(gamma).__name__})")
        return x.new_full(sizes, number(op, "gamma", gamma), dtype=dtype)
    if gamma.dtype is dtype and gamma.shape == (1,) and gamma.device == x.device:
        return gamma.expand(sizes)
    check_same_device(op, Argument("gamma", gamma), like)
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


def channel_energy(query: Tensor, key: Tensor | None = None) -> Tensor:
    r"""The first half of channel attention, without scale: ``E_ck = sum_n q_cn k_kn``.

    Energies over parts of the positions add up to those over all: ``channel_apply`` of their sum is
    ``channel_attention``.

    Args:
        query: (B, C, *S), float16, bfloat16, float32 or float64, perhaps without positions: the energies are then 0.
        key: (B, K, *S); None, or the same tensor, for the query itself. The energy is then symmetric, and half of it is
            computed.

    Returns:
        (B, C, K), in the dtype of accumulation: float64 for float64 inputs, else float32. Gradients too.

    Raises:
        TypeError: for an argument that is not a tensor.
        RuntimeError: for mismatched shapes, dtypes or devices.
    """
    if has_torch_function((query, key)):
        overridden: Tensor = handle_torch_function(channel_energy, (query, key), query, key)
        return overridden
    if not (isinstance(query, Tensor) and (key is None or isinstance(key, Tensor))):
        check_tensors("channel_energy", query=query, **({} if key is None else {"key": key}))
    if key is None or key is query:
        (query,) = autocast(query)
        key = None
    else:
        query, key = autocast(query, key)
    operators = _backend.operators("channel_energy", *([query] if key is None else [query, key]))
    if operators is None:
        check_channel_energy(query, key)
        with without_autocast(query.device.type):
            return reference.channel_energy(query, key)
    energy: Tensor = operators.channel_energy(query, key)
    return energy


def channel_apply(energy: Tensor, value: Tensor, scale: float = -1.0, gamma: Tensor | float | None = None) -> Tensor:
    r"""The second half of channel attention: ``A = softmax_k(scale * E_ck)``, ``out_c = sum_k A_ck v_k``, and, with
    gamma, ``gamma * out + v``.

    The gradient of the energy is linear in that of the output: gradients from parts of the positions add up.

    Args:
        energy: (B, C, K), in the dtype of accumulation of value, as from ``channel_energy``.
        value: (B, K, *T), float16, bfloat16, float32 or float64, perhaps without positions.
        scale: multiplies the energies. Not differentiable.
        gamma: None, or the factor as in ``residual_channel_attention``; C = K then.

    Returns:
        (B, C, *T), in the dtype and memory format of value. Under autocast in autocast's dtype; with gamma, the
        attention is computed in autocast's dtype and the residual is not rounded.

    Raises:
        TypeError: for a tensor argument that is not a tensor, a gamma that is neither a number nor a tensor, and a
            scale that is not a number.
        RuntimeError: for mismatched shapes, dtypes or devices, for C != K with gamma, and for a scale that is not
            finite.
    """
    if has_torch_function((energy, value, gamma)):
        arguments = (energy, value, scale, gamma)
        overridden: Tensor = handle_torch_function(channel_apply, (energy, value, gamma), *arguments)
        return overridden
    if not (isinstance(energy, Tensor) and isinstance(value, Tensor)):
        check_tensors("channel_apply", energy=energy, value=value)
    if type(scale) is not float:
        scale = number("channel_apply", "scale", scale)
    if gamma is None:
        (converted,) = autocast(value)
        return like_inputs(_apply(energy, converted, scale), value)
    if energy.dim() != 3 or value.dim() < 3:  # gamma's sizes follow from theirs
        check_channel_apply(energy, value, scale, None)
    factors = channel_factors("channel_apply", gamma, Argument("value", value), energy.shape[1])
    (converted,) = autocast(value)
    if converted.dtype != value.dtype:
        check_channel_apply(energy, value, scale, factors)
        attended = _apply(energy, converted, scale)
        output = (factors.reshape(*factors.shape, *[1] * (value.dim() - 2)) * attended + value).to(value.dtype)
    else:
        output = _apply(energy, value, scale, factors)
    return like_inputs(output, value)


def _apply(energy: Tensor, value: Tensor, scale: float, gamma: Tensor | None = None) -> Tensor:
    tensors = (value, energy) if gamma is None else (value, energy, gamma)
    operators = _backend.operators("channel_apply", *tensors)
    if operators is None:
        check_channel_apply(energy, value, scale, gamma)
        with without_autocast(value.device.type):
            results = reference.channel_apply(energy, value, scale, gamma)
    else:
        results = operators.channel_apply(energy, value, scale, gamma)
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


def check_channel_energy(query: Tensor, key: Tensor | None, op: str = "channel_energy") -> None:
    """query (B, C, *S), key (B, K, *S); query is key too if no key is given."""
    q, k = Argument("query", query), Argument("key", query if key is None else key)
    check_dtype(op, q)
    check_like(op, k, q)
    check_feature_map(op, q)
    check_feature_map(op, k)
    check_has_channels(op, q)
    check_has_channels(op, k)
    check_batch(op, k, q)
    check_spatial(op, k, q)


def check_channel_energy_backward(
    grad_energy: Tensor, query: Tensor, key: Tensor | None, needs_input_grad: Sequence[bool]
) -> None:
    """grad_energy (B, C, K), query (B, C, *S), key (B, K, *S)."""
    op = "channel_energy_backward"
    check_channel_energy(query, key, op)
    g, q = Argument("grad_energy", grad_energy), Argument("query", query)
    check_same_device(op, g, q)
    check_dtype_is(op, g, accumulation_dtype(query.dtype), "for these inputs")
    check_shape_is(op, g, (*query.shape[:2], (query if key is None else key).shape[1]))
    check_needs_input_grad(op, needs_input_grad, 2)


def check_channel_apply(
    energy: Tensor, value: Tensor, scale: float, gamma: Tensor | None, op: str = "channel_apply"
) -> None:
    """energy (B, C, K), value (B, K, *T), gamma (B, C), which demands K = C."""
    e, v = Argument("energy", energy), Argument("value", value)
    check_dtype(op, v)
    check_same_device(op, v, e)
    check_dtype_is(op, e, accumulation_dtype(value.dtype), "for these inputs")
    check_feature_map(op, v)
    check_has_channels(op, v)
    if energy.dim() != 3:
        fail(op, f"energy must have 3 dimensions, (batch, channels, keys) (got shape {shape_of(energy)})")
    check_has_channels(op, e)
    check_batch(op, e, v)
    if energy.shape[2] != value.shape[1]:
        fail(op, f"energy must have {value.shape[1]} keys, the channels of value (got {energy.shape[2]})")
    check_scale(op, scale)
    if gamma is not None:
        g = Argument("gamma", gamma)
        check_same_device(op, g, v)
        check_dtype_is(op, g, accumulation_dtype(value.dtype), "for these inputs")
        check_shape_is(op, g, energy.shape[:2])
        if energy.shape[1] != energy.shape[2]:
            fail(op, f"energy must have as many channels as keys with gamma (got shape {shape_of(energy)})")


def check_channel_apply_backward(
    grad_output: Tensor,
    energy: Tensor,
    value: Tensor,
    scale: float,
    gamma: Tensor | None,
    needs_input_grad: Sequence[bool],
) -> None:
    """grad_output (B, C, *T), energy (B, C, K), value (B, K, *T), gamma (B, C)."""
    op = "channel_apply_backward"
    check_channel_apply(energy, value, scale, gamma, op)
    g, e, v = Argument("grad_output", grad_output), Argument("energy", energy), Argument("value", value)
    check_like(op, g, v)
    check_feature_map(op, g)
    check_batch(op, g, v)
    check_channels(op, g, e)
    check_spatial(op, g, v)
    check_needs_input_grad(op, needs_input_grad, 3)


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


def _fake_energy(query: Tensor, key: Tensor | None = None) -> Tensor:
    check_channel_energy(query, key)
    sizes = (*query.shape[:2], (query if key is None else key).shape[1])
    return query.new_empty(sizes, dtype=accumulation_dtype(query.dtype))


def _fake_energy_backward(
    grad_energy: Tensor, query: Tensor, key: Tensor | None = None, needs_input_grad: Sequence[bool] = (True, True)
) -> list[Tensor]:
    check_channel_energy_backward(grad_energy, query, key, needs_input_grad)
    if key is None:
        return empty_gradients((query, query), (needs_input_grad[0], False))
    return empty_gradients((query, key), needs_input_grad)


def _fake_apply(energy: Tensor, value: Tensor, scale: float, gamma: Tensor | None = None) -> tuple[Tensor, Tensor]:
    check_channel_apply(energy, value, scale, gamma)
    output = value.new_empty((*energy.shape[:2], *value.shape[2:]))
    return output, energy.new_empty(energy.shape[:2])


def _fake_apply_backward(
    grad_output: Tensor,
    energy: Tensor,
    value: Tensor,
    scale: float,
    gamma: Tensor | None = None,
    needs_input_grad: Sequence[bool] = (True, True, True),
) -> list[Tensor]:
    check_channel_apply_backward(grad_output, energy, value, scale, gamma, needs_input_grad)
    return empty_gradients((energy, value, energy.new_empty(energy.shape[:2])), needs_input_grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])


def _setup_self_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.scale, gamma = inputs
    ctx.save_for_backward(x, gamma)
    ctx.mark_non_differentiable(output[1])


def _setup_energy_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _setup_apply_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    energy, value, ctx.scale, gamma = inputs
    ctx.save_for_backward(energy, value, gamma)
    ctx.mark_non_differentiable(output[1])


def _backward(operator: Any, ctx: Any, grad_output: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
    inputs, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:3])
    return *wanted(operator(grad_output, *inputs, ctx.scale, needs), needs, inputs), None


def _self_backward(operator: Any, ctx: Any, grad_output: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
    x, gamma = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], gamma is not None and ctx.needs_input_grad[2]]
    grad_input, grad_gamma = wanted(operator(grad_output, x, ctx.scale, gamma, needs), needs, (x,))
    return grad_input, None, grad_gamma


def _energy_backward(operator: Any, ctx: Any, grad_energy: Tensor) -> tuple[Tensor | None, ...]:
    query, key = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], key is not None and ctx.needs_input_grad[1]]
    grad_query, grad_key = wanted(
        operator(grad_energy, query, key, needs), needs, (query,) if key is None else (query, key)
    )
    return grad_query, grad_key


def _apply_backward(operator: Any, ctx: Any, grad_output: Tensor, grad_logsumexp: Tensor) -> tuple[Tensor | None, ...]:
    energy, value, gamma = ctx.saved_tensors
    needs = [*ctx.needs_input_grad[:2], gamma is not None and ctx.needs_input_grad[3]]
    grad_energy, grad_value, grad_gamma = wanted(
        operator(grad_output, energy, value, ctx.scale, gamma, needs), needs, ()
    )
    if grad_value is not None:
        grad_value = like_inputs(grad_value, value)
    return grad_energy, grad_value, None, grad_gamma


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


def _flops_energy(query: Sequence[int], key: Sequence[int] | None = None) -> int:
    """Half of the symmetric energy without key."""
    products = query[0] * query[1] * math.prod(query[2:])
    return products * query[1] if key is None else 2 * products * key[1]


def _flops_energy_backward(
    grad_energy: Sequence[int],
    query: Sequence[int],
    key: Sequence[int] | None = None,
    needs_input_grad: Sequence[bool] = (True, True),
) -> int:
    """A product for each gradient; without key, one with grad_energy + grad_energy^T."""
    gradients = int(needs_input_grad[0]) if key is None else sum(needs_input_grad)
    return 2 * gradients * math.prod(grad_energy) * math.prod(query[2:])


def _flops_apply(energy: Sequence[int], value: Sequence[int], gamma: Any = None) -> int:
    return 2 * math.prod(energy) * math.prod(value[2:])


def _flops_apply_backward(
    grad_output: Any,
    energy: Sequence[int],
    value: Sequence[int],
    gamma: Any = None,
    needs_input_grad: Sequence[bool] = (True, True, True),
) -> int:
    """dA = dO value^T for the energy and gamma, and A^T dO for the value."""
    products = (needs_input_grad[0] or needs_input_grad[2]) + needs_input_grad[1]
    return 2 * products * math.prod(energy) * math.prod(value[2:])


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
    Operator(
        "channel_energy",
        fake=_fake_energy,
        fake_backward=_fake_energy_backward,
        setup_context=_setup_energy_context,
        backward=_energy_backward,
        jvp=_derivatives.energy_jvp,
        backward_jvp=_derivatives.energy_backward_jvp,
        double_backward=_derivatives.energy_double_backward,
        flops=_flops_energy,
        flops_backward=_flops_energy_backward,
    ),
    Operator(
        "channel_apply",
        fake=_fake_apply,
        fake_backward=_fake_apply_backward,
        setup_context=_setup_apply_context,
        backward=_apply_backward,
        jvp=_derivatives.apply_jvp,
        backward_jvp=_derivatives.apply_backward_jvp,
        double_backward=_derivatives.apply_double_backward,
        flops=_flops_apply,
        flops_backward=_flops_apply_backward,
    ),
)
