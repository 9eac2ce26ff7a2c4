"""Criss-cross attention: each position attends to its row and its column."""

from collections.abc import Callable, Sequence
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
    check_has_channels,
    check_image,
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
from ._derivatives import criss_cross as _derivatives
from ._heads import check_heads, logsumexp_of_heads, merge_heads, split_heads
from ._memory_format import like_inputs
from ._positions import flat_positions
from ._register import Operator, channels_of_products, empty_gradients, wanted


@overload
def criss_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    *,
    num_heads: int = 1,
    return_logsumexp: Literal[False] = False,
) -> Tensor: ...
@overload
def criss_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    *,
    num_heads: int = 1,
    return_logsumexp: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def criss_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    *,
    num_heads: int = 1,
    return_logsumexp: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def criss_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float = 1.0,
    *,
    num_heads: int = 1,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each position over the H + W - 1 positions of its row and column, itself counted once:
    ``criss_cross_aggregation(softmax(scale * criss_cross_affinity(query, key)), value)`` in one operator, without
    the (B, H + W - 1, H, W) attention map. Memory beyond the results is O(H W) forward and, for the mean keys,
    O(E H W) backward.

    Args:
        query: (B, E, H, W), float16, bfloat16, float32 or float64. Any strides; contiguous is fastest.
        key: (B, E, H, W).
        value: (B, C, H, W).
        scale: multiplies query . key; 1 in CCNet. Not differentiable.
        num_heads: groups of consecutive channels that attend independently, as in :func:`position_attention`.
        return_logsumexp: also returns the logsumexp of the energies over row and column. Both results are
            differentiable.

    Returns:
        (B, C, H, W), in the inputs' dtype, and in channels_last if query or value is. Accumulated in float32, float64
        for float64. With ``return_logsumexp`` a pair with (B, num_heads, H, W) in the dtype of accumulation.

    Raises:
        TypeError: for an argument that is not a tensor, for a scale that is not a number, and for a num_heads that is
            not an int.
        ValueError: for a num_heads below 1.
        RuntimeError: for mismatched shapes, dtypes or devices, a height or width of 0, a scale that is not finite, and
            for channels that cannot be split into num_heads.

    Source: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation" (2019), section 3.2.
    """
    if has_torch_function((query, key, value)):
        overridden: Tensor | tuple[Tensor, Tensor] = handle_torch_function(
            criss_cross_attention,
            (query, key, value),
            query,
            key,
            value,
            scale,
            num_heads=num_heads,
            return_logsumexp=return_logsumexp,
        )
        return overridden
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        check_tensors("criss_cross_attention", query=query, key=key, value=value)
    if type(scale) is not float:
        scale = number("criss_cross_attention", "scale", scale)
    query, key, value = autocast(query, key, value)
    if type(num_heads) is not int or num_heads != 1:
        check_criss_cross_attention(query, key, value, scale)  # messages with the caller's sizes
        check_heads("criss_cross_attention", num_heads, query=query, key=key, value=value)
        feature_maps = query, value
        query, key, value = (split_heads(t, num_heads) for t in (query, key, value))
    operators = _backend.operators("criss_cross_attention", query, key, value)
    if operators is None:
        check_criss_cross_attention(query, key, value, scale)
        with without_autocast(query.device.type):
            results = reference.criss_cross_attention(query, key, value, scale)
    else:
        results = operators.criss_cross_attention(query, key, value, scale)
    output: Tensor = results[0]
    if num_heads != 1:
        output = merge_heads(output, num_heads)
        query, value = feature_maps
    if query.stride(1) == 1 or value.stride(1) == 1:
        output = like_inputs(output, query, value)
    return (output, logsumexp_of_heads(results[1], num_heads)) if return_logsumexp else output


def criss_cross_rows(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The part of :func:`criss_cross_attention` over the row, self included. Criss-cross attention is the mean of this
    output and of that of :func:`criss_cross_columns`, weighted by exp(logsumexp + logsumexp_low) of either.

    Args:
        query: (B, E, H, W), float16, bfloat16, float32 or float64.
        key: (B, E, H, W).
        value: (B, C, H, W).
        scale: multiplies query . key. Not differentiable.

    Returns:
        output (B, C, H, W), logsumexp (B, H, W) and its rounding error (B, H, W), all in the dtype of accumulation:
        float32, float64 for float64. Of a query whose energies are all -inf, output is 0, logsumexp -inf and the
        rounding error 0. Output and logsumexp are differentiable, once.

    Raises:
        TypeError: for an argument that is not a tensor, and for a scale that is not a number.
        RuntimeError: for mismatched shapes, dtypes or devices, a height or width of 0, and a scale that is not finite.
    """
    return _part("criss_cross_rows", reference.criss_cross_rows, query, key, value, scale)


def criss_cross_columns(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """The part of :func:`criss_cross_attention` over the column, self left out: for a height of 1 over no key at all.
    Arguments, results and errors as of :func:`criss_cross_rows`."""
    return _part("criss_cross_columns", reference.criss_cross_columns, query, key, value, scale)


def _part(
    op: str, definition: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    check_tensors(op, query=query, key=key, value=value)
    scale = number(op, "scale", scale)
    query, key, value = autocast(query, key, value)
    operators = _backend.operators(op, query, key, value)
    if operators is None:
        check_criss_cross_attention(query, key, value, scale, op)
        with without_autocast(query.device.type):
            output, logsumexp, low = definition(query, key, value, scale)
    else:
        output, logsumexp, low = getattr(operators, op)(query, key, value, scale)
    return like_inputs(output, query, value), logsumexp, low


def criss_cross_affinity(query: Tensor, key: Tensor) -> Tensor:
    """CCNet's Affinity (its `ca_weight`): the dot products of each position with its row and its column.

    Args:
        query: (B, E, H, W), float16, bfloat16, float32 or float64.
        key: (B, E, H, W).

    Returns:
        (B, H + W - 1, H, W): channels [0, W) the row, self included; [W, W + H - 1) the column without self, so that
        channel W + i of a position in row y is row i for i < y and row i + 1 from there on.

    Raises:
        TypeError: for an argument that is not a tensor.
        RuntimeError: for mismatched shapes, dtypes or devices, and for a height or width of 0.

    Source: Huang et al. (2019), section 3.2, and the layout of the authors' CUDA version.
    """
    if has_torch_function((query, key)):
        overridden: Tensor = handle_torch_function(criss_cross_affinity, (query, key), query, key)
        return overridden
    check_tensors("criss_cross_affinity", query=query, key=key)
    query, key = autocast(query, key)
    operators = _backend.operators("criss_cross_affinity", query, key)
    if operators is None:
        check_criss_cross_affinity(query, key)
        with without_autocast(query.device.type):
            affinity = reference.criss_cross_affinity(query, key)
    else:
        affinity = operators.criss_cross_affinity(query, key)
    return like_inputs(affinity, query, key)


def criss_cross_aggregation(attention: Tensor, value: Tensor) -> Tensor:
    """CCNet's Aggregation (its `ca_map`): the sum of the values of each position's row and column, weighted.

    Args:
        attention: (B, H + W - 1, H, W), laid out as by :func:`criss_cross_affinity`; float16, bfloat16, float32 or
            float64.
        value: (B, C, H, W).

    Returns:
        (B, C, H, W), in the inputs' dtype.

    Raises:
        TypeError: for an argument that is not a tensor.
        RuntimeError: for mismatched shapes, dtypes or devices, a height or width of 0, and a channel count that is
            not H + W - 1.

    Source: Huang et al. (2019), section 3.2.
    """
    if has_torch_function((attention, value)):
        overridden: Tensor = handle_torch_function(criss_cross_aggregation, (attention, value), attention, value)
        return overridden
    check_tensors("criss_cross_aggregation", attention=attention, value=value)
    attention, value = autocast(attention, value)
    operators = _backend.operators("criss_cross_aggregation", attention, value)
    if operators is None:
        check_criss_cross_aggregation(attention, value)
        with without_autocast(attention.device.type):
            output = reference.criss_cross_aggregation(attention, value)
    else:
        output = operators.criss_cross_aggregation(attention, value)
    return like_inputs(output, attention, value)


def criss_cross_attention_map(
    query: Tensor | Sequence[Tensor],
    key: Tensor | Sequence[Tensor],
    positions: Tensor,
    recurrence: int = 1,
    scale: float = 1.0,
    *,
    num_heads: int | None = None,
) -> Tensor:
    """Chosen rows of the attention map of `recurrence` successive criss-cross attentions, over the whole image: with
    two, every position attends to every other.

    Args:
        query: (B, E, H, W), or one such tensor for each recurrence, the first applied first.
        key: likewise.
        positions: (P, 2), integer (y, x); negative ones count from the end.
        recurrence: how many attentions are applied, at least 1.
        scale: as in :func:`criss_cross_attention`.
        num_heads: as in :func:`criss_cross_attention`; if it is given, 1 too, the result has a dimension for the heads.
            With a recurrence, each head is followed by itself: the channels are not mixed between the attentions.

    Returns:
        (B, P, H, W), with ``num_heads`` (B, num_heads, P, H, W), in the dtype of accumulation; every row sums to 1.

    Raises:
        RuntimeError: as :func:`criss_cross_attention`.
        TypeError: for a query or key that is not a tensor, a scale that is not a number, and a num_heads that is not an
            int.
        ValueError: for positions outside the feature map or of another shape, a recurrence or num_heads that is not a
            positive integer, or sequences of another length.
    """
    op = "criss_cross_attention_map"
    if not isinstance(recurrence, int) or isinstance(recurrence, bool) or recurrence < 1:
        raise ValueError(f"{op}: recurrence must be a positive integer (got {recurrence})")
    queries = [query] * recurrence if isinstance(query, Tensor) else list(query)
    keys = [key] * recurrence if isinstance(key, Tensor) else list(key)
    if len(queries) != recurrence or len(keys) != recurrence:
        raise ValueError(
            f"{op}: query and key must be one tensor or {recurrence} of them, one for each recurrence "
            f"(got {len(queries)} and {len(keys)})"
        )
    scale = number(op, "scale", scale)
    for q, k in zip(queries, keys, strict=True):
        check_tensors(op, query=q, key=k)
    attentions = []
    for q, k in (autocast(q, k) for q, k in zip(queries, keys, strict=True)):
        check_criss_cross_attention(q, k, q, scale, op)
        later, first = Argument("query", q), Argument("the first query", queries[0])
        check_batch(op, later, first)
        check_spatial(op, later, first)
        if num_heads is not None:
            check_heads(op, num_heads, query=q, key=k)
            q, k = split_heads(q, num_heads), split_heads(k, num_heads)
        attentions.append(criss_cross_weights(q, k, scale))
    rows = rows_of_product(attentions, positions, op)
    return rows if num_heads is None else rows.unflatten(0, (-1, num_heads))


def criss_cross_weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The weights of :func:`criss_cross_attention`, (B, H + W - 1, H, W), in the dtype of accumulation."""
    dtype = accumulation_dtype(query.dtype)
    with without_autocast(query.device.type):
        return (scale * criss_cross_affinity(query.to(dtype), key.to(dtype))).softmax(1)


def rows_of_product(attentions: Sequence[Tensor], positions: Tensor, op: str) -> Tensor:
    """Chosen rows of the product of criss-cross attention maps.

    Args:
        attentions: the weights (B, H + W - 1, H, W) of each attention, the first applied first.
        positions: (P, 2), integer (y, x).
        op: named in errors.

    Returns:
        (B, P, H, W), in the dtype of the weights.
    """
    batch, _, height, width = attentions[0].shape
    device = attentions[0].device
    index = flat_positions(positions, (height, width), device, op)
    rows = attentions[0].new_zeros(batch, index.shape[0], height * width)
    rows = rows.scatter(2, index[:, None].expand(batch, -1, -1), 1).unflatten(2, (height, width))
    with without_autocast(device.type):
        for attention in reversed(attentions):
            rows = reference.criss_cross_aggregation_transposed(rows, attention)
    return rows


def check_reach(op: str, argument: Argument, like: Argument) -> None:
    """(B, H + W - 1, H, W): a channel for every position of the row and of the column of `like`."""
    check_image(op, argument)
    got, expected = argument.tensor.shape[1], like.tensor.shape[2] + like.tensor.shape[3] - 1
    if got != expected:
        fail(op, f"{argument.name} must have H + W - 1 = {expected} channels (got {got})")


def check_criss_cross_affinity(
    query: Tensor, key: Tensor, op: str = "criss_cross_affinity", may_be_empty: bool = False
) -> None:
    """query (B, E, H, W), key (B, E, H, W)."""
    q, k = Argument("query", query), Argument("key", key)
    check_dtype(op, q)
    check_like(op, k, q)
    check_image(op, q, may_be_empty)
    check_image(op, k, may_be_empty)
    check_has_channels(op, q)
    check_batch(op, k, q)
    check_channels(op, k, q)
    check_spatial(op, k, q)


def check_criss_cross_affinity_backward(
    grad_affinity: Tensor, query: Tensor, key: Tensor, needs_input_grad: Sequence[bool]
) -> None:
    """grad_affinity (B, H + W - 1, H, W), query (B, E, H, W), key (B, E, H, W)."""
    op = "criss_cross_affinity_backward"
    check_criss_cross_affinity(query, key, op)
    g, q = Argument("grad_affinity", grad_affinity), Argument("query", query)
    check_like(op, g, q)
    check_reach(op, g, q)
    check_batch(op, g, q)
    check_spatial(op, g, q)
    check_needs_input_grad(op, needs_input_grad, 2)


def check_criss_cross_aggregation(attention: Tensor, value: Tensor, op: str = "criss_cross_aggregation") -> None:
    """attention (B, H + W - 1, H, W), value (B, C, H, W)."""
    a, v = Argument("attention", attention), Argument("value", value)
    check_dtype(op, a)
    check_like(op, v, a)
    check_image(op, a)
    check_image(op, v)
    check_has_channels(op, v)
    check_batch(op, v, a)
    check_spatial(op, v, a)
    check_reach(op, a, v)


def check_criss_cross_aggregation_backward(
    grad_output: Tensor, attention: Tensor, value: Tensor, needs_input_grad: Sequence[bool]
) -> None:
    """grad_output (B, C, H, W), attention (B, H + W - 1, H, W), value (B, C, H, W)."""
    op = "criss_cross_aggregation_backward"
    check_criss_cross_aggregation(attention, value, op)
    g, v = Argument("grad_output", grad_output), Argument("value", value)
    check_like(op, g, v)
    check_shape(op, g, v)
    check_needs_input_grad(op, needs_input_grad, 2)


def check_criss_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    op: str = "criss_cross_attention",
    may_be_empty: bool = False,
) -> None:
    """query (B, E, H, W), key (B, E, H, W), value (B, C, H, W)."""
    check_criss_cross_affinity(query, key, op, may_be_empty)
    q, v = Argument("query", query), Argument("value", value)
    check_like(op, v, q)
    check_image(op, v, may_be_empty)
    check_has_channels(op, v)
    check_batch(op, v, q)
    check_spatial(op, v, q)
    check_scale(op, scale)


def check_criss_cross_attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
    logsumexp_low: Tensor | None,
    grad_logsumexp: Tensor | None,
    needs_input_grad: Sequence[bool],
) -> None:
    """grad_output (B, C, H, W), query (B, E, H, W), key (B, E, H, W), value (B, C, H, W), output (B, C, H, W),
    logsumexp (B, H, W), logsumexp_low (B, H, W), grad_logsumexp (B, H, W)."""
    op = "criss_cross_attention_backward"
    check_criss_cross_attention(query, key, value, scale, op)
    v, o = Argument("value", value), Argument("output", output)
    g, l = Argument("grad_output", grad_output), Argument("logsumexp", logsumexp)  # noqa: E741
    check_like(op, o, v)
    check_shape(op, o, v)
    check_like(op, g, v)
    check_shape(op, g, v)
    check_same_device(op, l, v)
    check_dtype_is(op, l, accumulation_dtype(query.dtype), "for these inputs")
    check_shape_is(op, l, (query.shape[0], *query.shape[2:]))
    if logsumexp_low is not None:
        low = Argument("logsumexp_low", logsumexp_low)
        check_like(op, low, l)
        check_shape(op, low, l)
    if grad_logsumexp is not None:
        gradient = Argument("grad_logsumexp", grad_logsumexp)
        check_like(op, gradient, l)
        check_shape(op, gradient, l)
    check_needs_input_grad(op, needs_input_grad, 3)


def check_criss_cross_part_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    logsumexp_low: Tensor,
    delta: Tensor,
    scale: float,
    needs_input_grad: Sequence[bool],
    op: str,
) -> None:
    """grad_output (B, C, H, W), query (B, E, H, W), key (B, E, H, W), value (B, C, H, W), logsumexp (B, H, W),
    logsumexp_low (B, H, W), delta (B, H, W)."""
    check_criss_cross_attention(query, key, value, scale, op)
    v, g = Argument("value", value), Argument("grad_output", grad_output)
    l, low = Argument("logsumexp", logsumexp), Argument("logsumexp_low", logsumexp_low)  # noqa: E741
    d = Argument("delta", delta)
    check_like(op, g, v)
    check_shape(op, g, v)
    check_same_device(op, l, v)
    check_dtype_is(op, l, accumulation_dtype(query.dtype), "for these inputs")
    check_shape_is(op, l, (query.shape[0], *query.shape[2:]))
    check_like(op, low, l)
    check_shape(op, low, l)
    check_like(op, d, l)
    check_shape(op, d, l)
    check_needs_input_grad(op, needs_input_grad, 3)


def _fake_affinity(query: Tensor, key: Tensor) -> Tensor:
    check_criss_cross_affinity(query, key)
    batch, _, height, width = query.shape
    return query.new_empty((batch, height + width - 1, height, width))


def _fake_affinity_backward(
    grad_affinity: Tensor, query: Tensor, key: Tensor, needs_input_grad: Sequence[bool] = (True, True)
) -> list[Tensor]:
    check_criss_cross_affinity_backward(grad_affinity, query, key, needs_input_grad)
    return empty_gradients((query, key), needs_input_grad)


def _fake_aggregation(attention: Tensor, value: Tensor) -> Tensor:
    check_criss_cross_aggregation(attention, value)
    return value.new_empty(value.shape)


def _fake_aggregation_backward(
    grad_output: Tensor, attention: Tensor, value: Tensor, needs_input_grad: Sequence[bool] = (True, True)
) -> list[Tensor]:
    check_criss_cross_aggregation_backward(grad_output, attention, value, needs_input_grad)
    return empty_gradients((attention, value), needs_input_grad)


def _fake(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    check_criss_cross_attention(query, key, value, scale)
    batch, _, height, width = query.shape
    logsumexp = query.new_empty((batch, height, width), dtype=accumulation_dtype(query.dtype))
    return value.new_empty(value.shape), logsumexp, logsumexp.new_empty(logsumexp.shape)


def _fake_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    logsumexp: Tensor,
    scale: float,
    logsumexp_low: Tensor | None = None,
    grad_logsumexp: Tensor | None = None,
    needs_input_grad: Sequence[bool] = (True, True, True),
    keys_complete: bool = False,
) -> list[Tensor]:
    check_criss_cross_attention_backward(
        grad_output, query, key, value, output, logsumexp, scale, logsumexp_low, grad_logsumexp, needs_input_grad
    )
    return empty_gradients((query, key, value), needs_input_grad)


def _fake_part(op: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    def fake(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        check_criss_cross_attention(query, key, value, scale, op)
        dtype = accumulation_dtype(query.dtype)
        batch, _, height, width = query.shape
        logsumexp = query.new_empty((batch, height, width), dtype=dtype)
        return value.new_empty(value.shape, dtype=dtype), logsumexp, logsumexp.new_empty(logsumexp.shape)

    return fake


def _fake_part_backward(op: str) -> Callable[..., list[Tensor]]:
    def fake(
        grad_output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        logsumexp: Tensor,
        logsumexp_low: Tensor,
        delta: Tensor,
        scale: float,
        needs_input_grad: Sequence[bool] = (True, True, True),
    ) -> list[Tensor]:
        check_criss_cross_part_backward(
            grad_output, query, key, value, logsumexp, logsumexp_low, delta, scale, needs_input_grad, op
        )
        dtype = accumulation_dtype(query.dtype)
        return [
            t.new_empty(t.shape if needed else (0,), dtype=dtype)
            for t, needed in zip((query, key, value), needs_input_grad, strict=True)
        ]

    return fake


def _setup_pair_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # otherwise autograd allocates zeros for the gradients of unused results


def _pair_backward(operator: Any, ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad)
    inputs = ctx.saved_tensors
    return tuple(wanted(operator(gradient, *inputs, needs), needs, inputs))


def _backward(
    operator: Any, ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None, grad_logsumexp_low: None
) -> tuple[Tensor | None, ...]:
    if grad_output is None and grad_logsumexp is None:  # as set_materialize_grads(False) allows
        return (None,) * 4
    query, key, value, output, logsumexp, logsumexp_low = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    inputs, needed = (query, key, value), needs
    if grad_output is None:
        # The logsumexp alone: one channel of zeros in place of the values, which may be infinite, and of the output.
        value = output = grad_output = value.new_zeros(value[:, :1].shape)
        needed = [*needs[:2], False]
    gradients = operator(
        grad_output, query, key, value, output, logsumexp, ctx.scale, logsumexp_low, grad_logsumexp, needed, True
    )
    if needed is not needs and needs[2]:
        gradients = [*gradients[:2], torch.zeros_like(inputs[2])]
    return *wanted(gradients, needs, inputs), None


def _part_backward(
    operator: Any, ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None, grad_logsumexp_low: None
) -> tuple[Tensor | None, ...]:
    if grad_output is None and grad_logsumexp is None:
        return (None,) * 4
    query, key, value, output, logsumexp, logsumexp_low = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    inputs, needed = (query, key, value), needs
    if grad_output is None:  # as in _backward
        value = grad_output = value.new_zeros(value[:, :1].shape)
        delta, needed = torch.zeros_like(logsumexp), [*needs[:2], False]
    else:
        grad_output = grad_output.to(value.dtype)  # delta of the same numbers as the kernels' dP
        delta = (grad_output.to(output.dtype) * output).sum(1)
    if grad_logsumexp is not None:
        delta = delta - grad_logsumexp
    gradients = operator(grad_output, query, key, value, logsumexp, logsumexp_low, delta, ctx.scale, needed)
    gradients = [g.to(query.dtype) for g in gradients]
    if needed is not needs and needs[2]:
        gradients = [*gradients[:2], torch.zeros_like(inputs[2])]
    return *wanted(gradients, needs, inputs), None


def _products(shape: Sequence[int], channels: int) -> int:
    """FLOP of one product of every position with its row and column, over `channels`."""
    return _row_products(shape, channels) + _column_products(shape, channels)


def _row_products(shape: Sequence[int], channels: int) -> int:
    batch, _, height, width = shape
    return 2 * batch * height * width * width * channels


def _column_products(shape: Sequence[int], channels: int) -> int:
    batch, _, height, width = shape
    return 2 * batch * height * width * (height - 1) * channels


def _part_operator(name: str, products: Callable[[Sequence[int], int], int]) -> Operator:
    return Operator(
        name,
        fake=_fake_part(name),
        fake_backward=_fake_part_backward(f"{name}_backward"),
        setup_context=_setup_context,
        backward=_part_backward,
        flops=lambda query, key, value: products(query, query[1] + value[1]),
        flops_backward=lambda grad_output, query, key, value, *saved, needs_input_grad=(True, True, True): products(
            query, channels_of_products(query[1], value[1], needs_input_grad)
        ),
    )


OPERATORS = (
    Operator(
        "criss_cross_affinity",
        fake=_fake_affinity,
        fake_backward=_fake_affinity_backward,
        setup_context=_setup_pair_context,
        backward=_pair_backward,
        jvp=_derivatives.affinity_jvp,
        backward_jvp=_derivatives.affinity_backward_jvp,
        double_backward=_derivatives.affinity_double_backward,
        flops=lambda query, key: _products(query, query[1]),
        flops_backward=lambda grad_affinity, query, key, needs_input_grad=(True, True): _products(
            query, query[1] * sum(needs_input_grad)
        ),
    ),
    Operator(
        "criss_cross_aggregation",
        fake=_fake_aggregation,
        fake_backward=_fake_aggregation_backward,
        setup_context=_setup_pair_context,
        backward=_pair_backward,
        jvp=_derivatives.aggregation_jvp,
        backward_jvp=_derivatives.aggregation_backward_jvp,
        double_backward=_derivatives.aggregation_double_backward,
        flops=lambda attention, value: _products(value, value[1]),
        flops_backward=lambda grad_output, attention, value, needs_input_grad=(True, True): _products(
            value, value[1] * sum(needs_input_grad)
        ),
    ),
    Operator(
        "criss_cross_attention",
        fake=_fake,
        fake_backward=_fake_backward,
        setup_context=_setup_context,
        backward=_backward,
        jvp=_derivatives.jvp,
        backward_jvp=_derivatives.backward_jvp,
        double_backward=_derivatives.double_backward,
        flops=lambda query, key, value: _products(query, query[1] + value[1]),
        flops_backward=lambda grad_output, query, key, value, *saved, needs_input_grad=(True, True, True): _products(
            query, channels_of_products(query[1], value[1], needs_input_grad)
        ),
    ),
    _part_operator("criss_cross_rows", _row_products),
    _part_operator("criss_cross_columns", _column_products),
)
