"""Position attention: softmax attention over all positions of a feature map, without the N x N
attention map."""

import math
from collections.abc import Sequence
from typing import Any

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
    check_same_device,
    check_scale,
    check_shape,
    check_shape_is,
    check_spatial,
    check_tensors,
    number,
)
from ._layout import warn_if_tokens
from ._positions import flat_positions
from ._register import Operator


def position_attention(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
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
        A call with 4-D tensors whose sizes suggest tokens warns once in a process.

    The N x M attention map is never stored: memory beyond the result is O(N + M), forward and backward. If a 16-bit
    input requires a gradient, the rounding error of the result, a tensor of the same size, is kept for the backward.

    Args:
        query: (B, E, *S), float16, bfloat16, float32 or float64. Any strides; contiguous is fastest.
        key: (B, E, *T), at least one position. T may differ from S, in the number of dimensions too.
        value: (B, C, *T).
        scale: multiplies the energies; 1 in DANet and CCNet, E ** -0.5 in scaled dot-product attention. Not
            differentiable.

    Returns:
        (B, C, *S), in the inputs' dtype. Accumulated in float32, float64 for float64.

    Raises:
        TypeError: for an argument that is not a tensor, and for a scale that is not a number.
        RuntimeError: for mismatched shapes, dtypes or devices, and for a scale that is not finite.

    Source: Wang et al., "Non-local Neural Networks" (2018), equation 1; Fu et al., "Dual Attention Network for Scene
    Segmentation" (2019), equations 1 and 2. The logsumexp that the backward pass needs is the second result of the
    operator ``torch.ops.segattn.position_attention``.
    """
    if has_torch_function((query, key, value)):
        overridden: Tensor = handle_torch_function(position_attention, (query, key, value), query, key, value, scale)
        return overridden
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        check_tensors("position_attention", query=query, key=key, value=value)
    if not torch.compiler.is_compiling():
        elements = key.numel()
        if type(elements) is int and elements == value.numel():  # a trace has a tensor here
            warn_if_tokens(query, key, value)
    if type(scale) is not float:
        scale = number("position_attention", "scale", scale)
    query, key, value = autocast(query, key, value)
    operators = _backend.operators("position_attention", query, key, value)
    if operators is None:
        check_position_attention(query, key, value, scale)
        with without_autocast(query.device.type):
            results = reference.position_attention(query, key, value, scale)
    else:
        results = operators.position_attention(query, key, value, scale, _needs_low(query, key, value))
    return results[0]


def _needs_low(*tensors: Tensor) -> bool:
    """Whether the backward pass needs the rounding error of the output. A traced graph keeps it for 16-bit tensors:
    torch.jit.trace compares graphs traced with and without gradients, and the graph may be trained."""
    if tensors[0].dtype.itemsize != 2:
        return False
    if torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
        return True
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def position_attention_map(query: Tensor, key: Tensor, positions: Tensor, scale: float = 1.0) -> Tensor:
    """Chosen rows of the attention map: the weights with which a position attends to every other.

    Args:
        query: (B, E, *S).
        key: (B, E, *T).
        positions: (P, number of dimensions of S), integer coordinates, (y, x) for an image; negative ones count
            from the end.
        scale: as in :func:`position_attention`.

    Returns:
        (B, P, *T), in the dtype of accumulation; every row sums to 1.

    Raises:
        TypeError, RuntimeError: as :func:`position_attention`.
        ValueError: for positions of another shape or dtype, or outside the feature map.
    """
    check_tensors("position_attention_map", query=query, key=key)
    scale = number("position_attention_map", "scale", scale)
    query, key = autocast(query, key)
    check_position_attention(query, key, key, scale, "position_attention_map")
    index = flat_positions(positions, query.shape[2:], "position_attention_map")
    dtype = accumulation_dtype(query.dtype)
    rows = query.flatten(2)[:, :, index.to(query.device)].to(dtype)  # (B, E, P)
    with without_autocast(query.device.type):
        energy = scale * (rows.transpose(1, 2) @ key.flatten(2).to(dtype))
    weights: Tensor = energy.softmax(2).unflatten(2, key.shape[2:])
    return weights


def check_position_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, op: str = "position_attention"
) -> None:
    """query (B, E, *S), key (B, E, *T), value (B, C, *T)."""
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
    check_has_positions(op, k)
    check_scale(op, scale)


def check_position_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
    output_low: Tensor | None,
) -> None:
    """grad_output (B, C, *S), query (B, E, *S), key (B, E, *T), value (B, C, *T), output (B, C, *S), logsumexp
    (B, *S), output_low (B, C, *S)."""
    op = "position_attention_backward"
    check_position_attention(query, key, value, scale, op)
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


def _fake(
    query: Tensor, key: Tensor, value: Tensor, scale: float, with_low: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    check_position_attention(query, key, value, scale)
    batch, spatial = query.shape[0], query.shape[2:]
    output = query.new_empty((batch, value.shape[1], *spatial))
    logsumexp = query.new_empty((batch, *spatial), dtype=accumulation_dtype(query.dtype))
    low_channels = value.shape[1] if with_low and query.dtype.itemsize == 2 else 0
    return output, logsumexp, query.new_empty((batch, low_channels, *spatial))


def _fake_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
    output_low: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_position_attention_backward(grad_output, query, key, value, output, logsumexp, scale, output_low)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, ctx.scale, _ = inputs
    result, logsumexp, output_low = output
    ctx.save_for_backward(query, key, value, result, logsumexp, output_low if output_low.shape[1] > 0 else None)
    ctx.mark_non_differentiable(logsumexp, output_low)
    ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros of output_low's size for its gradient


def _backward(
    operator: Any, ctx: Any, grad_output: Tensor | None, grad_logsumexp: None, grad_output_low: None
) -> tuple[Tensor | None, ...]:
    if grad_output is None:  # as set_materialize_grads(False) allows
        return (None,) * 5
    *saved, output_low = ctx.saved_tensors
    return *operator(grad_output, *saved, ctx.scale, output_low), None, None


def _flops(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> int:
    return 2 * query[0] * math.prod(query[2:]) * math.prod(key[2:]) * (query[1] + value[1])


def _flops_backward(
    grad_output: Any, query: Sequence[int], key: Sequence[int], value: Sequence[int], *saved: Any
) -> int:
    """The energies are recomputed: three products over E, two over C."""
    return 2 * query[0] * math.prod(query[2:]) * math.prod(key[2:]) * (3 * query[1] + 2 * value[1])


def _adjust_vmap(query: Tensor, key: Tensor, value: Tensor, scale: float, with_low: bool = False) -> tuple[Any, ...]:
    """Decides with_low again: a tensor that vmap wraps does not require a gradient even if the one inside does."""
    return query, key, value, scale, with_low or _needs_low(query, key, value)


OPERATORS = (
    Operator(
        "position_attention",
        fake=_fake,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        backward=_backward,
        flops=_flops,
        flops_backward=_flops_backward,
        adjust_vmap=_adjust_vmap,
    ),
)
