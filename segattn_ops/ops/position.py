"""Position attention: softmax attention over all positions of a feature map, without the N x N
attention map."""

import math
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from .. import _backend, reference
from .._autocast import autocast, without_autocast
from ._check import (
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
    number,
)
from ._derivatives import position as _derivatives
from ._heads import check_heads, logsumexp_of_heads, merge_heads, split_heads
from ._layout import warn_if_tokens
from ._memory_format import like_inputs
from ._positions import flat_positions
from ._register import Operator, channels_of_products, empty_gradients, wanted


@overload
def position_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    *,
    num_heads: int = 1,
    key_padding_mask: Tensor | None = None,
    return_logsumexp: Literal[False] = False,
) -> Tensor: ...
@overload
def position_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    *,
    num_heads: int = 1,
    key_padding_mask: Tensor | None = None,
    return_logsumexp: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def position_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    *,
    num_heads: int = 1,
    key_padding_mask: Tensor | None = None,
    return_logsumexp: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def position_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    *,
    num_heads: int = 1,
    key_padding_mask: Tensor | None = None,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention over all positions of feature maps, (batch, channels, height, width) or other spatial dimensions.

    ``out_i = sum_j softmax_j(scale * q_i . k_j) v_j``, the attention of a Non-local block, of DANet's position
    attention module and, with pooled keys and values, of ANN and DRANet.

    Warning:
        The channels are dimension 1, and all further dimensions are positions. Other layouts are accepted where their
        sizes agree, and give other numbers. From (B, heads, N, D) tokens, fold the heads into the batch and put the
        channels first::

            out = position_attention(*(t.flatten(0, 1).mT for t in (q, k, v)), D**-0.5)  # (B * heads, D, N)
            out = out.mT.unflatten(0, (B, heads))

        From (B, heads, D, H, W) maps only the heads are folded: ``t.flatten(0, 1)``. From (B, N, D) tokens: ``t.mT``.
        Heads that are groups of channels need no folding: ``num_heads``.
        A call with 4-D tensors whose sizes suggest tokens warns once in a process.

    The N x M attention map is never stored: memory beyond the result is O(N + M), forward and backward. If a 16-bit
    input requires a gradient, the rounding error of the result, a tensor of the same size, is kept for the backward.

    Args:
        query: (B, E, *S), float16, bfloat16, float32 or float64. Any strides; contiguous is fastest.
        key: (B, E, *T), at least one position. T may differ from S, in the number of dimensions too.
        value: (B, C, *T).
        scale: multiplies the energies; 1 in DANet and CCNet, E ** -0.5 in scaled dot-product attention. Not
            differentiable.
        num_heads: groups of consecutive channels that attend independently: head h takes the channels
            [h * E / num_heads, (h + 1) * E / num_heads) of query and key, and likewise of value. A view of contiguous
            tensors.
        key_padding_mask: (B, *T), bool, True for a key that is padding, as in ``torch.nn.MultiheadAttention``. Such a
            key has no weight, and what it and its value hold, NaN too, has no influence. A sample in which every key
            is padding has the output 0, the logsumexp -inf and gradients of 0.
        return_logsumexp: also returns the logsumexp of the energies over the keys. Both results are differentiable.

    Returns:
        (B, C, *S), in the inputs' dtype, and in channels_last if query or value is. Accumulated in float32, float64 for
        float64. With ``return_logsumexp`` a pair with (B, num_heads, *S) in the dtype of accumulation.

    Raises:
        TypeError: for an argument that is not a tensor, for a scale that is not a number, and for a num_heads that is
            not an int.
        ValueError: for a num_heads below 1.
        RuntimeError: for mismatched shapes, dtypes or devices, for a scale that is not finite, and for channels that
            cannot be split into num_heads.

    Source: Wang et al., "Non-local Neural Networks" (2018), equation 1; Fu et al., "Dual Attention Network for Scene
    Segmentation" (2019), equations 1 and 2; heads: Vaswani et al., "Attention Is All You Need" (2017), section 3.2.2.
    """
    if has_torch_function((query, key, value, key_padding_mask)):
        overridden: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            position_attention,
            (query, key, value, key_padding_mask),
            query,
            key,
            value,
            scale,
            num_heads=num_heads,
            key_padding_mask=key_padding_mask,
            return_logsumexp=return_logsumexp,
        )
        return overridden
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        check_tensors("position_attention", query=query, key=key, value=value)
    if not torch.compiler.is_compiling():
        elements = key.numel()
        if type(elements) is int and elements == value.numel():  # a trace has a tensor here
            warn_if_tokens(query, key, value)
    if type(scale) is not float:
        scale = number("position_attention", "scale", scale)
    if key_padding_mask is not None and not isinstance(key_padding_mask, Tensor):
        check_tensors("position_attention", key_padding_mask=key_padding_mask)
    query, key, value = autocast(query, key, value)
    if type(num_heads) is not int or num_heads != 1:
        check_position_attention(query, key, value, scale, key_padding_mask)  # messages with the caller's sizes
        check_heads("position_attention", num_heads, query=query, key=key, value=value)
        feature_maps = query, value
        query, key, value = (split_heads(t, num_heads) for t in (query, key, value))
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.repeat_interleave(num_heads, 0)
    operators = _backend.operators("position_attention", query, key, value)
    if operators is None:
        check_position_attention(query, key, value, scale, key_padding_mask)
        with without_autocast(query.device.type):
            results = reference.position_attention(query, key, value, scale, key_padding_mask)
    else:
        with_low = query.dtype.itemsize == 2 and _needs_low(query, key, value)
        results = operators.position_attention(query, key, value, scale, with_low, key_padding_mask)
    output: Tensor = results[0]
    if num_heads != 1:
        output = merge_heads(output, num_heads)
        query, value = feature_maps
    if query.stride(1) == 1 or value.stride(1) == 1:
        output = like_inputs(output, query, value)
    return (output, logsumexp_of_heads(results[1], num_heads)) if return_logsumexp else output


def position_attention_partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    *,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`position_attention` over a part of the keys, for merging with that over the others.

    With ``w_r = exp((logsumexp_r - max logsumexp) + logsumexp_low_r)`` of part r, attention over all keys is
    ``sum_r w_r output_r / sum_r w_r``.

    Args:
        query: (B, E, *S), float16, bfloat16, float32 or float64.
        key: (B, E, *T), perhaps without positions.
        value: (B, C, *T).
        scale: as in :func:`position_attention`.
        key_padding_mask: (B, *T), as in :func:`position_attention`.

    Returns:
        output (B, C, *S), logsumexp (B, *S) and the rounding error of logsumexp (B, *S), all in the dtype of
        accumulation. Of a query without keys, or whose energies are all -inf, they are 0, -inf and 0. Output and
        logsumexp are differentiable once, in reverse mode.

    Raises:
        TypeError: for an argument that is not a tensor, and for a scale that is not a number.
        RuntimeError: for mismatched shapes, dtypes or devices, and for a scale that is not finite.
    """
    op = "position_attention_partial"
    check_tensors(op, query=query, key=key, value=value)
    if key_padding_mask is not None:
        check_tensors(op, key_padding_mask=key_padding_mask)
    scale = number(op, "scale", scale)
    query, key, value = autocast(query, key, value)
    operators = _backend.operators(op, query, key, value)
    if operators is None:
        check_position_attention_partial(query, key, value, scale, key_padding_mask)
        with without_autocast(query.device.type):
            return reference.position_attention_partial(query, key, value, scale, key_padding_mask)
    results: tuple[Tensor, Tensor, Tensor] = operators.position_attention_partial(
        query, key, value, scale, key_padding_mask
    )
    return results


def _needs_low(*tensors: Tensor) -> bool:
    """Whether the backward pass needs the rounding error of the output of 16-bit tensors. A traced graph keeps it:
    torch.jit.trace compares graphs traced with and without gradients, and the graph may be trained."""
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def position_attention_map(
    query: Tensor,
    key: Tensor,
    positions: Tensor,
    scale: float = 1.0,
    *,
    num_heads: int | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Chosen rows of the attention map: the weights with which a position attends to every other.

    Args:
        query: (B, E, *S).
        key: (B, E, *T).
        positions: (P, number of dimensions of S), integer coordinates, (y, x) for an image; negative ones count
            from the end.
        scale: as in :func:`position_attention`.
        num_heads: as in :func:`position_attention`; if it is given, 1 too, the result has a dimension for the heads.
        key_padding_mask: (B, *T), as in :func:`position_attention`.

    Returns:
        (B, P, *T), with ``num_heads`` (B, num_heads, P, *T), in the dtype of accumulation. Every row sums to 1, or is 0
        in a sample in which every key is padding.

    Raises:
        TypeError, RuntimeError: as :func:`position_attention`.
        ValueError: for positions of another shape or dtype, or outside the feature map, and for a num_heads below 1.
    """
    op = "position_attention_map"
    check_tensors(op, query=query, key=key)
    if key_padding_mask is not None:
        check_tensors(op, key_padding_mask=key_padding_mask)
    scale = number(op, "scale", scale)
    query, key = autocast(query, key)
    check_position_attention(query, key, key, scale, key_padding_mask, op)
    if num_heads is not None:
        check_heads(op, num_heads, query=query, key=key)
        query, key = split_heads(query, num_heads), split_heads(key, num_heads)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.repeat_interleave(num_heads, 0)
    index = flat_positions(positions, query.shape[2:], query.device, op)
    dtype = accumulation_dtype(query.dtype)
    rows = query.flatten(2)[:, :, index].to(dtype)  # (B, E, P)
    padding = None if key_padding_mask is None else key_padding_mask.flatten(1)
    with without_autocast(query.device.type):
        weights: Tensor = reference.position_weights(rows, key.flatten(2).to(dtype), scale, padding)[0]
    weights = weights.unflatten(2, key.shape[2:])
    if num_heads is not None:
        weights = weights.unflatten(0, (-1, num_heads))
    return weights


def check_position_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    key_padding_mask: Tensor | None,
    op: str = "position_attention",
    is_part: bool = False,
) -> None:
    """query (B, E, *S), key (B, E, *T), value (B, C, *T), key_padding_mask (B, *T). is_part: the keys are a part of
    all keys, perhaps none."""
    q, k, v = Argument("query", query), Argument("key", key), Argument("value", value)
    check_dtype(op, q)
    check_like(op, k, q)
    check_like(op, v, q)
    check_feature_map(op, q)
    check_feature_map(op, k)
    check_feature_map(op, v)
    check_has_channels(op, q)
    check_has_channels(op, v)
    check_batch(op, k, q)
    check_batch(op, v, q)
    check_channels(op, k, q)
    check_spatial(op, v, k)
    if not is_part:
        check_has_positions(op, k)
    check_scale(op, scale)
    if key_padding_mask is not None:
        mask = Argument("key_padding_mask", key_padding_mask)
        check_same_device(op, mask, k)
        check_dtype_is(op, mask, torch.bool, "with True for padding")
        check_shape_is(op, mask, (key.shape[0], *key.shape[2:]))


def check_position_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
    output_low: Tensor | None,
    logsumexp_low: Tensor | None,
    grad_logsumexp: Tensor | None,
    needs_input_grad: Sequence[bool],
    key_padding_mask: Tensor | None,
) -> None:
    """grad_output (B, C, *S), query (B, E, *S), key (B, E, *T), value (B, C, *T), output (B, C, *S), logsumexp
    (B, *S), output_low (B, C, *S), logsumexp_low, grad_logsumexp (B, *S), key_padding_mask (B, *T)."""
    op = "position_attention_backward"
    check_position_attention(query, key, value, scale, key_padding_mask, op)
    q, v, o = Argument("query", query), Argument("value", value), Argument("output", output)
    g, l = Argument("grad_output", grad_output), Argument("logsumexp", logsumexp)  # noqa: E741
    check_like(op, o, q)
    check_like(op, g, q)
    check_feature_map(op, o)
    check_batch(op, o, q)
    check_channels(op, o, v)
    check_spatial(op, o, q)
    check_shape(op, g, o)
    check_same_device(op, l, q)
    check_dtype_is(op, l, accumulation_dtype(query.dtype), "for these inputs")
    check_shape_is(op, l, (query.shape[0], *query.shape[2:]))
    if output_low is not None:
        low = Argument("output_low", output_low)
        check_like(op, low, q)
        check_shape(op, low, o)
    if logsumexp_low is not None:
        rest = Argument("logsumexp_low", logsumexp_low)
        check_like(op, rest, l)
        check_shape(op, rest, l)
    if grad_logsumexp is not None:
        gradient = Argument("grad_logsumexp", grad_logsumexp)
        check_like(op, gradient, l)
        check_shape(op, gradient, l)
    check_needs_input_grad(op, needs_input_grad, 3)


def check_position_attention_partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    key_padding_mask: Tensor | None,
    op: str = "position_attention_partial",
) -> None:
    """query (B, E, *S), key (B, E, *T), value (B, C, *T), key_padding_mask (B, *T)."""
    check_position_attention(query, key, value, scale, key_padding_mask, op, True)


def check_position_attention_partial_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    logsumexp_low: Tensor,
    delta: Tensor,
    scale: float,
    needs_input_grad: Sequence[bool],
    key_padding_mask: Tensor | None,
) -> None:
    """grad_output (B, C, *S), query (B, E, *S), key (B, E, *T), value (B, C, *T), logsumexp, logsumexp_low, delta
    (B, *S), key_padding_mask (B, *T)."""
    op = "position_attention_partial_backward"
    check_position_attention_partial(query, key, value, scale, key_padding_mask, op)
    q, v, g = Argument("query", query), Argument("value", value), Argument("grad_output", grad_output)
    l = Argument("logsumexp", logsumexp)  # noqa: E741
    check_like(op, g, q)
    check_feature_map(op, g)
    check_batch(op, g, q)
    check_channels(op, g, v)
    check_spatial(op, g, q)
    check_same_device(op, l, q)
    check_dtype_is(op, l, accumulation_dtype(query.dtype), "for these inputs")
    check_shape_is(op, l, (query.shape[0], *query.shape[2:]))
    low, d = Argument("logsumexp_low", logsumexp_low), Argument("delta", delta)
    check_like(op, low, l)
    check_shape(op, low, l)
    check_like(op, d, l)
    check_shape(op, d, l)
    check_needs_input_grad(op, needs_input_grad, 3)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    with_low: bool = False,
    key_padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_position_attention(query, key, value, scale, key_padding_mask)
    batch, spatial = query.shape[0], query.shape[2:]
    output = query.new_empty((batch, value.shape[1], *spatial))
    logsumexp = query.new_empty((batch, *spatial), dtype=accumulation_dtype(query.dtype))
    is_16_bit = query.dtype.itemsize == 2
    output_low = query.new_empty((batch, value.shape[1] if with_low and is_16_bit else 0, *spatial))
    logsumexp_low = logsumexp.new_empty((batch, 0, *spatial[1:]) if is_16_bit else logsumexp.shape)
    return output, logsumexp, output_low, logsumexp_low


def _fake_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
    output_low: Tensor | None = None,
    logsumexp_low: Tensor | None = None,
    grad_logsumexp: Tensor | None = None,
    needs_input_grad: Sequence[bool] = (True, True, True),
    key_padding_mask: Tensor | None = None,
    keys_complete: bool = False,
) -> list[Tensor]:
    check_position_attention_backward(
        grad_output,
        query,
        key,
        value,
        output,
        logsumexp,
        scale,
        output_low,
        logsumexp_low,
        grad_logsumexp,
        needs_input_grad,
        key_padding_mask,
    )
    return empty_gradients((query, key, value), needs_input_grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    query, key, value, ctx.scale, _, key_padding_mask = inputs
    result, logsumexp, output_low, logsumexp_low = output
    lows = output_low if output_low.shape[1] > 0 else None, logsumexp_low if query.dtype.itemsize > 2 else None
    ctx.save_for_backward(query, key, value, result, logsumexp, *lows, key_padding_mask)
    ctx.mark_non_differentiable(output_low, logsumexp_low)
    ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros for the gradients of unused results


def _backward(
    operator: Any, ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None, *grad_lows: None
) -> tuple[Tensor | None, ...]:
    if grad_output is None and grad_logsumexp is None:  # as set_materialize_grads(False) allows
        return (None,) * 6
    query, key, value, output, logsumexp, output_low, logsumexp_low, key_padding_mask = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    inputs, needed = (query, key, value), needs
    if grad_output is None:
        # The logsumexp alone: one channel of zeros in place of the values, which may be infinite, and of the output.
        value, grad_output = key.new_zeros((key.shape[0], 1, *key.shape[2:])), output.new_zeros(output[:, :1].shape)
        output, output_low, needed = grad_output, None, [*needs[:2], False]
    gradients = operator(
        grad_output,
        query,
        key,
        value,
        output,
        logsumexp,
        ctx.scale,
        output_low,
        logsumexp_low,
        grad_logsumexp,
        needed,
        key_padding_mask,
        True,
    )
    if needed is not needs and needs[2]:
        gradients = [*gradients[:2], torch.zeros_like(inputs[2])]
    return *wanted(gradients, needs, inputs), None, None, None


def _fake_partial(
    query: Tensor, key: Tensor, value: Tensor, scale: float, key_padding_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    check_position_attention_partial(query, key, value, scale, key_padding_mask)
    batch, spatial, dtype = query.shape[0], query.shape[2:], accumulation_dtype(query.dtype)
    output = query.new_empty((batch, value.shape[1], *spatial), dtype=dtype)
    logsumexp, logsumexp_low = (query.new_empty((batch, *spatial), dtype=dtype) for _ in range(2))
    return output, logsumexp, logsumexp_low


def _fake_partial_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    logsumexp_low: Tensor,
    delta: Tensor,
    scale: float,
    needs_input_grad: Sequence[bool] = (True, True, True),
    key_padding_mask: Tensor | None = None,
) -> list[Tensor]:
    check_position_attention_partial_backward(
        grad_output,
        query,
        key,
        value,
        logsumexp,
        logsumexp_low,
        delta,
        scale,
        needs_input_grad,
        key_padding_mask,
    )
    return [
        t.new_empty(t.shape if needed else (0,), dtype=accumulation_dtype(t.dtype))
        for t, needed in zip((query, key, value), needs_input_grad, strict=True)
    ]


def _setup_context_partial(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, ctx.scale, key_padding_mask = inputs
    ctx.save_for_backward(query, key, value, *output, key_padding_mask)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward_partial(
    operator: Any, ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None, grad_logsumexp_low: None
) -> tuple[Tensor | None, ...]:
    if grad_output is None and grad_logsumexp is None:
        return (None,) * 5
    query, key, value, output, logsumexp, logsumexp_low, key_padding_mask = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    inputs, needed = (query, key, value), needs
    if grad_output is None:  # as in _backward
        value = key.new_zeros((key.shape[0], 1, *key.shape[2:]))
        rounded, delta = output.new_zeros(output[:, :1].shape, dtype=query.dtype), torch.zeros_like(logsumexp)
        needed = [*needs[:2], False]
    else:
        # delta is summed from what the operator's products take, so that it fits them.
        rounded = grad_output.to(query.dtype)
        delta = (rounded * output).sum(1)
    if grad_logsumexp is not None:
        delta = delta - grad_logsumexp
    gradients = operator(
        rounded, query, key, value, logsumexp, logsumexp_low, delta, ctx.scale, needed, key_padding_mask
    )
    gradients = [g.to(query.dtype) for g in gradients]
    if needed is not needs and needs[2]:
        gradients = [*gradients[:2], torch.zeros_like(inputs[2])]
    return *wanted(gradients, needs, inputs), None, None


def _flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], key_padding_mask: Any = None) -> int:
    return 2 * query[0] * math.prod(query[2:]) * math.prod(key[2:]) * (query[1] + value[1])


def _flops_backward(
    grad_output: Any,
    query: Sequence[int],
    key: Sequence[int],
    value: Sequence[int],
    *saved: Any,
    needs_input_grad: Sequence[bool] = (True, True, True),
) -> int:
    """The energies are recomputed: with all gradients three products over E, two over C."""
    return (
        2
        * query[0]
        * math.prod(query[2:])
        * math.prod(key[2:])
        * channels_of_products(query[1], value[1], needs_input_grad)
    )


def _adjust_vmap(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    with_low: bool = False,
    key_padding_mask: Tensor | None = None,
) -> tuple[Any, ...]:
    """Decides with_low again: a tensor that vmap wraps does not require a gradient even if the one inside does."""
    with_low = with_low or (query.dtype.itemsize == 2 and _needs_low(query, key, value))
    return query, key, value, scale, with_low, key_padding_mask


OPERATORS = (
    Operator(
        "position_attention",
        fake=_fake,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        backward=_backward,
        jvp=_derivatives.jvp,
        backward_jvp=_derivatives.backward_jvp,
        double_backward=_derivatives.double_backward,
        flops=_flops,
        flops_backward=_flops_backward,
        adjust_vmap=_adjust_vmap,
    ),
    Operator(
        "position_attention_partial",
        fake=_fake_partial,
        fake_backward=_fake_partial_backward,
        setup_context=_setup_context_partial,
        backward=_backward_partial,
        flops=_flops,
        flops_backward=_flops_backward,
    ),
)
