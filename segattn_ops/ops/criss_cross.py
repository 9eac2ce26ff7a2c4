"""Criss-cross attention: each position attends to its row and its column."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import _backend, reference
from ._check import Arguments, accumulation_dtype
from ._register import autocast, register_flops, register_once_differentiable, register_vmap
from .position import flat_positions


def criss_cross_attention(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """Softmax attention of each position over the H + W - 1 positions of its row and column, itself counted once:
    ``criss_cross_aggregation(softmax(scale * criss_cross_affinity(query, key)), value)`` in one operator, without
    the (B, H + W - 1, H, W) map. Memory beyond the result is O(H W), forward and backward.

    Args:
        query: (B, E, H, W), float16, bfloat16, float32 or float64. Any strides; contiguous is fastest.
        key: (B, E, H, W).
        value: (B, C, H, W).
        scale: multiplies the affinities; CCNet has 1. Not differentiable.

    Returns:
        (B, C, H, W), in the inputs' dtype. Accumulated in float32, float64 for float64.

    Raises:
        RuntimeError: for mismatched shapes, dtypes or devices, a height or width of 0, a scale that is not finite.

    Source: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation" (2019), section 3.2.
    """
    query, key, value = autocast(query, key, value)
    operators = _backend.operators(query.device)
    if operators is None:
        _check(query, key, value, scale)
        return _backend.call_reference(reference.criss_cross_attention, query, key, value, scale)[0]
    return operators.criss_cross_attention(query, key, value, scale)[0]


def criss_cross_affinity(query: Tensor, key: Tensor) -> Tensor:
    """CCNet's Affinity (its `ca_weight`): the dot products of each position with its row and its column.

    Args:
        query: (B, E, H, W), float16, bfloat16, float32 or float64.
        key: (B, E, H, W).

    Returns:
        (B, H + W - 1, H, W): channels [0, W) the row, self included; [W, W + H - 1) the column without self, so that
        channel W + i of a position in row y is row i for i < y and row i + 1 from there on.

    Raises:
        RuntimeError: for mismatched shapes, dtypes or devices, and for a height or width of 0.

    Source: Huang et al. (2019), section 3.2, and the layout of the authors' CUDA version.
    """
    query, key = autocast(query, key)
    operators = _backend.operators(query.device)
    if operators is None:
        _check_affinity(query, key)
        return _backend.call_reference(reference.criss_cross_affinity, query, key)
    return operators.criss_cross_affinity(query, key)


def criss_cross_aggregation(attention: Tensor, value: Tensor) -> Tensor:
    """CCNet's Aggregation (its `ca_map`): the sum of the values of each position's row and column, weighted.

    Args:
        attention: (B, H + W - 1, H, W), laid out as by :func:`criss_cross_affinity`; float16, bfloat16, float32 or
            float64.
        value: (B, C, H, W).

    Returns:
        (B, C, H, W), in the inputs' dtype.

    Raises:
        RuntimeError: for mismatched shapes, dtypes or devices, a height or width of 0, and a channel count that is
            not H + W - 1.

    Source: Huang et al. (2019), section 3.2.
    """
    attention, value = autocast(attention, value)
    operators = _backend.operators(value.device)
    if operators is None:
        _check_aggregation(attention, value)
        return _backend.call_reference(reference.criss_cross_aggregation, attention, value)
    return operators.criss_cross_aggregation(attention, value)


def criss_cross_attention_map(
    query: Tensor | Sequence[Tensor],
    key: Tensor | Sequence[Tensor],
    positions: Tensor,
    recurrence: int = 1,
    scale: float = 1.0,
) -> Tensor:
    """Chosen rows of the attention map that `recurrence` criss-cross attentions in a row amount to, over the whole
    image: at two, every position sees every other.

    Args:
        query: (B, E, H, W), or one such tensor for each recurrence, the first applied first.
        key: likewise.
        positions: (P, 2), integer (y, x); negative ones count from the end.
        recurrence: how many attentions are applied, at least 1.
        scale: as in :func:`criss_cross_attention`.

    Returns:
        (B, P, H, W), in the dtype of accumulation; every row sums to 1.

    Raises:
        RuntimeError: as :func:`criss_cross_attention`.
        ValueError: for positions outside the map or of another shape, a recurrence below 1, or sequences of another
            length.
    """
    op = "criss_cross_attention_map"
    if recurrence < 1:
        raise ValueError(f"{op}: recurrence must be at least 1 (got {recurrence})")
    queries = [query] * recurrence if isinstance(query, Tensor) else list(query)
    keys = [key] * recurrence if isinstance(key, Tensor) else list(key)
    if len(queries) != recurrence or len(keys) != recurrence:
        raise ValueError(
            f"{op}: query and key must be one tensor or {recurrence} of them, one a recurrence (got {len(queries)} and "
            f"{len(keys)})"
        )
    for q, k in zip(queries, keys, strict=True):
        _check(q, k, q, scale, op)
    batch, _, height, width = queries[0].shape
    index = flat_positions(positions, torch.Size((height, width)), op).to(queries[0].device)
    dtype = accumulation_dtype(queries[0].dtype)
    rows = torch.zeros(batch, len(index), height * width, dtype=dtype, device=queries[0].device)
    rows[:, torch.arange(len(index), device=index.device), index] = 1
    rows = rows.unflatten(2, (height, width))
    # A row vector times the map is the gradient of the aggregation with respect to its values: the last attention
    # is undone first.
    for q, k in zip(reversed(queries), reversed(keys), strict=True):
        attention = (scale * criss_cross_affinity(q.detach().to(dtype), k.detach().to(dtype))).softmax(1)
        with torch.enable_grad():
            value = torch.zeros_like(rows, requires_grad=True)
            output = criss_cross_aggregation(attention, value)
        (rows,) = torch.autograd.grad(output, value, rows)
    return rows


def _check_affinity(query: Tensor, key: Tensor, op: str = "criss_cross_affinity") -> None:
    arguments = Arguments(op, query=query, key=key)
    arguments.dtype("query")
    arguments.like("key", "query")
    arguments.image("query")
    arguments.image("key")
    arguments.has_channels("query")
    arguments.batch("key", "query")
    arguments.channels("key", "query")
    arguments.spatial("key", "query")


def _check_aggregation(attention: Tensor, value: Tensor, op: str = "criss_cross_aggregation") -> None:
    arguments = Arguments(op, attention=attention, value=value)
    arguments.dtype("attention")
    arguments.like("value", "attention")
    arguments.image("attention")
    arguments.image("value")
    arguments.has_channels("value")
    arguments.batch("value", "attention")
    arguments.spatial("value", "attention")
    arguments.reach("attention", "value")


def _check(query: Tensor, key: Tensor, value: Tensor, scale: float, op: str = "criss_cross_attention") -> None:
    _check_affinity(query, key, op)
    arguments = Arguments(op, query=query, value=value)
    arguments.like("value", "query")
    arguments.image("value")
    arguments.has_channels("value")
    arguments.batch("value", "query")
    arguments.spatial("value", "query")
    arguments.scale(scale)


def _fake_affinity(query: Tensor, key: Tensor) -> Tensor:
    _check_affinity(query, key)
    batch, _, height, width = query.shape
    return query.new_empty((batch, height + width - 1, height, width))


def _fake_affinity_backward(grad_affinity: Tensor, query: Tensor, key: Tensor):
    _check_affinity(query, key, "criss_cross_affinity_backward")
    return query.new_empty(query.shape), key.new_empty(key.shape)


def _fake_aggregation(attention: Tensor, value: Tensor) -> Tensor:
    _check_aggregation(attention, value)
    return value.new_empty(value.shape)


def _fake_aggregation_backward(grad_output: Tensor, attention: Tensor, value: Tensor):
    _check_aggregation(attention, value, "criss_cross_aggregation_backward")
    return attention.new_empty(attention.shape), value.new_empty(value.shape)


def _fake(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    _check(query, key, value, scale)
    batch, _, height, width = query.shape
    return value.new_empty(value.shape), query.new_empty((batch, height, width), dtype=accumulation_dtype(query.dtype))


def _fake_backward(grad_output, query, key, value, output, logsumexp, scale):
    _check(query, key, value, scale, "criss_cross_attention_backward")
    return tuple(t.new_empty(t.shape) for t in (query, key, value))


def _setup_pair(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _setup_context(ctx, inputs, output) -> None:
    query, key, value, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.mark_non_differentiable(output[1])


def _products(shape, channels: int) -> int:
    """FLOP of one product of every position with its row and column, over `channels`."""
    batch, _, height, width = shape
    return 2 * batch * height * width * (height + width - 1) * channels


def register(namespace: str) -> None:
    """Registers the Python side of the family's operators in `namespace`."""
    operators = getattr(torch.ops, namespace)

    def affinity_backward(ctx, grad_affinity):
        return operators.criss_cross_affinity_backward(grad_affinity, *ctx.saved_tensors)

    def aggregation_backward(ctx, grad_output):
        return operators.criss_cross_aggregation_backward(grad_output, *ctx.saved_tensors)

    def attention_backward(ctx, grad_output, grad_logsumexp):
        return *operators.criss_cross_attention_backward(grad_output, *ctx.saved_tensors, ctx.scale), None

    families = {
        "criss_cross_affinity": (_fake_affinity, _fake_affinity_backward, affinity_backward, _setup_pair),
        "criss_cross_aggregation": (_fake_aggregation, _fake_aggregation_backward, aggregation_backward, _setup_pair),
        "criss_cross_attention": (_fake, _fake_backward, attention_backward, _setup_context),
    }
    for op, (fake, fake_backward, backward, setup_context) in families.items():
        name = f"{namespace}::{op}"
        torch.library.register_fake(name, fake)
        torch.library.register_fake(f"{name}_backward", fake_backward)
        torch.library.register_autograd(name, backward, setup_context=setup_context)
        register_once_differentiable(f"{name}_backward")
        register_vmap(name)
        register_vmap(f"{name}_backward")

    register_flops(operators.criss_cross_affinity, lambda q, k: _products(q, q[1]))
    register_flops(operators.criss_cross_affinity_backward, lambda g, q, k: 2 * _products(q, q[1]))
    register_flops(operators.criss_cross_aggregation, lambda a, v: _products(v, v[1]))
    register_flops(operators.criss_cross_aggregation_backward, lambda g, a, v: 2 * _products(v, v[1]))
    register_flops(operators.criss_cross_attention, lambda q, k, v: _products(q, q[1] + v[1]))
    register_flops(
        operators.criss_cross_attention_backward, lambda g, q, k, v, o, lse: _products(q, 3 * q[1] + 2 * v[1])
    )
