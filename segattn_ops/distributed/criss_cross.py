"""Criss-cross attention of a sharded feature map.

A rank holds parts of the rows and columns of the map. For each direction that is sharded, the ranks along it exchange
their parts for whole lines, each rank a part of the lines: one message to each other rank, and one back with the
results. Row and column results are merged by their logsumexp.

With a mesh of one dimension the rows are whole already; they are computed while the columns are on their way.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import _backend
from .._autocast import autocast
from ..ops._check import accumulation_dtype, check_tensors, number
from ..ops._heads import check_heads, logsumexp_of_heads, merge_heads, split_heads
from ..ops._memory_format import like_inputs
from ..ops.criss_cross import check_criss_cross_attention
from . import _parts
from ._agreement import agree, check_call, describe, in_step, number_call, tells_errors
from ._collectives import Arriving, Spec, exchange
from ._functions import differentiable_once, result
from ._merge import Partial, delta_of, merge, without_any_key_is_nan
from ._mesh import Group, Space
from ._tensors import local_shards

_OP = "distributed.criss_cross_attention"


@overload
def criss_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mesh: DeviceMesh | None = None,
    scale: float = 1.0,
    num_heads: int = 1,
    return_logsumexp: Literal[False] = False,
) -> Tensor: ...
@overload
def criss_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mesh: DeviceMesh | None = None,
    scale: float = 1.0,
    num_heads: int = 1,
    return_logsumexp: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@tells_errors(_OP)
def criss_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mesh: DeviceMesh | None = None,
    scale: float = 1.0,
    num_heads: int = 1,
    return_logsumexp: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r""":func:`segattn_ops.criss_cross_attention` of a feature map that is sharded over the ranks of a mesh.

    Every rank of the mesh calls it with its own part of the map and gets its results. Exact: up to the order of the
    sums the results are those of one process with the whole map, and the same mesh gives the same bits.

    Args:
        query: (B, E, h, w), the rank's own part; float16, bfloat16, float32 or float64. Or a DTensor, as key and value
            then are. A rank may have no rows, or no columns: a size of 0.
        key: (B, E, h, w).
        value: (B, C, h, w).
        mesh: of one dimension, over which the rows of the map are sharded, in the order of the ranks; or of two, over
            which the rows and the columns are. Not needed with DTensors.
        scale: multiplies the energies.
        num_heads: as of :func:`segattn_ops.criss_cross_attention`.
        return_logsumexp: also returns the logsumexp over row and column.

    Returns:
        (B, C, h, w), and with ``return_logsumexp`` (B, num_heads, h, w): the rank's own part, differentiable once.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`segattn_ops.criss_cross_attention` and
            :func:`segattn_ops.distributed.position_attention`; if the ranks' parts do not form a map.
    """
    check_tensors(_OP, query=query, key=key, value=value)
    scale = number(_OP, "scale", scale)
    mesh, local, wrap = local_shards(_OP, mesh, query=query, key=key, value=value)
    query, key, value = autocast(*local.values())
    options = (("scale", scale), ("num_heads", num_heads), ("return_logsumexp", return_logsumexp))
    space, shapes = agree(_OP, mesh, describe(query=query, key=key, value=value), options, _check)
    heights, widths = extents(_OP, space, [of_rank[0][2:] for of_rank in shapes])
    heads = (split_heads(t, num_heads) for t in (query, key, value))
    output, logsumexp = _CrissCrossAttention.apply(*heads, scale, space, heights, widths)
    output = wrap(like_inputs(merge_heads(output, num_heads), query, value))
    return (output, wrap(logsumexp_of_heads(logsumexp, num_heads))) if return_logsumexp else output


def _check(query: Tensor, key: Tensor, value: Tensor, scale: float, num_heads: int, return_logsumexp: bool) -> None:
    check_criss_cross_attention(query, key, value, scale, _OP, may_be_empty=True)
    check_heads(_OP, num_heads, query=query, key=key, value=value)


def extents(op: str, space: Space, sizes: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The heights and widths of the parts, from the (h, w) of each rank: one height for each index of the first
    dimension of the mesh, one width for each of the second, or one for all.

    Raises:
        RuntimeError: if the parts do not form a map.
    """
    rows, columns = space.shape[0], space.shape[1] if len(space.shape) == 2 else 1
    heights = tuple(sizes[i * columns][0] for i in range(rows))
    widths = tuple(sizes[j][1] for j in range(columns))
    for i in range(rows):
        for j in range(columns):
            expected, got = (heights[i], widths[j]), tuple(sizes[i * columns + j])
            if got != expected:
                raise RuntimeError(
                    f"{op}: rank {space.whole.ranks[i * columns + j]} must have a part of {expected[0]} x "
                    f"{expected[1]} positions, as its row and column of the mesh do (got {got[0]} x {got[1]})"
                )
    if sum(heights) == 0 or sum(widths) == 0:
        raise RuntimeError(
            f"{op}: the map must have a height and a width of at least 1 (got {sum(heights)} x {sum(widths)})"
        )
    return heights, widths


class _Lines:
    """The exchange between parts of the lines of one direction and whole lines.

    Args:
        group: the ranks along the direction.
        sharded: the dimension that the lines run along, 2 for columns and 3 for rows.
        lengths: of the parts of the ranks.
        lines: how many lines the ranks hold parts of.
    """

    def __init__(self, group: Group, sharded: int, lengths: tuple[int, ...], lines: int) -> None:
        self.group, self.sharded, self.other, self.lengths = group, sharded, 5 - sharded, lengths
        each, more = divmod(lines, group.size)
        self.counts = [each + (index < more) for index in range(group.size)]

    def _spec(self, tensor: Tensor, length: int, lines: int) -> Spec:
        shape = list(tensor.shape)
        shape[self.sharded], shape[self.other] = length, lines
        return Spec(tuple(shape), tensor.dtype)

    def start_to_lines(self, tensors: Sequence[Tensor]) -> Arriving:
        """From (B, channels, h, w) with parts of all lines."""
        messages = list(zip(*(t.split(self.counts, self.other) for t in tensors), strict=True))
        own = self.counts[self.group.index]
        specs = [[self._spec(t, length, own) for t in tensors] for length in self.lengths]
        return exchange(_OP, self.group, messages, specs)

    def finish_to_lines(self, arriving: Arriving) -> list[Tensor]:
        """To (B, channels, H, own lines) or (B, channels, own lines, W)."""
        return [torch.cat(parts, self.sharded) for parts in zip(*arriving.wait(), strict=True)]

    def to_parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The way back."""
        messages = list(zip(*(t.split(self.lengths, self.sharded) for t in tensors), strict=True))
        own = self.lengths[self.group.index]
        specs = [[self._spec(t, own, lines) for t in tensors] for lines in self.counts]
        arrived = exchange(_OP, self.group, messages, specs).wait()
        return [torch.cat(parts, self.other) for parts in zip(*arrived, strict=True)]


_OPERATORS = ("criss_cross_rows", "criss_cross_columns")


class _CrissCrossAttention(torch.autograd.Function):
    """query, key (B, E, h, w), value (B, C, h, w), this rank's part -> output (B, C, h, w), logsumexp (B, h, w)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        space: Space,
        heights: tuple[int, ...],
        widths: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        ctx.operators = _backend.operators("criss_cross_attention", query, key, value)
        ctx.scale, ctx.group, ctx.call = scale, space.whole, number_call(space.whole)
        ctx.lines = _directions(space, heights, widths)
        operands = [query, key, value]
        with in_step(_OP, space.whole):
            arriving = [lines.start_to_lines(operands) for lines in ctx.lines if lines is not None]
            parts: list[Partial] = []
            whole: list[Tensor] = []
            for name, lines in zip(_OPERATORS, ctx.lines, strict=True):
                own = operands if lines is None else lines.finish_to_lines(arriving.pop(0))
                part = _attend(ctx, name, own)
                if lines is not None:
                    whole += own
                    output, logsumexp, low = part
                    output, logsumexp, low = lines.to_parts([output, logsumexp.unsqueeze(1), low.unsqueeze(1)])
                    part = output, logsumexp.squeeze(1), low.squeeze(1)
                parts.append(part)
        output, logsumexp, low = merge(*parts)
        without_any_key_is_nan(output, logsumexp)
        ctx.save_for_backward(query, key, value, output, logsumexp, low, *whole)
        ctx.set_materialize_grads(False)
        return result(output.to(query.dtype)), result(logsumexp)

    @staticmethod
    @differentiable_once(_OP)
    def backward(ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, output, logsumexp, low, *whole = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:3])
        if grad_output is None:
            grad_output = output.new_zeros(output.shape, dtype=query.dtype)
        delta = delta_of(grad_output, output, grad_logsumexp)
        sent = [grad_output.contiguous(), *(t.unsqueeze(1) for t in (logsumexp, low, delta))]
        with in_step(_OP, ctx.group):
            check_call(_OP, ctx.group, ctx.call, query.device)
            arriving = [lines.start_to_lines(sent) for lines in ctx.lines if lines is not None]
            total: list[Tensor] | None = None
            for name, lines in zip(_OPERATORS, ctx.lines, strict=True):
                if lines is None:
                    found = _differentiate(ctx, name, sent, [query, key, value], needs)
                else:
                    own, whole = whole[:3], whole[3:]
                    incoming = lines.finish_to_lines(arriving.pop(0))
                    found = lines.to_parts(_differentiate(ctx, name, incoming, own, needs))
                total = found if total is None else [t.add_(f) for t, f in zip(total, found, strict=True)]
        assert total is not None
        gradients = iter(total)
        rounded = (next(gradients).to(query.dtype) if needed else None for needed in needs)
        return *rounded, None, None, None, None


def _directions(space: Space, heights: tuple[int, ...], widths: tuple[int, ...]) -> list[_Lines | None]:
    """The exchanges for the rows and for the columns; None where the lines are whole."""
    columns = space.along[0]
    rows = space.along[1] if len(space.shape) == 2 else None
    width = widths[0 if rows is None else rows.index]
    return [
        None if rows is None or rows.size == 1 else _Lines(rows, 3, widths, heights[columns.index]),
        None if columns.size == 1 else _Lines(columns, 2, heights, width),
    ]


def _attend(ctx: Any, name: str, operands: Sequence[Tensor]) -> Partial:
    """The lines of one direction; perhaps none."""
    query, key, value = operands
    if query.shape[2:].numel() == 0:
        dtype = accumulation_dtype(query.dtype)
        statistics = query.new_empty((query.shape[0], *query.shape[2:]), dtype=dtype)
        return value.new_empty(value.shape, dtype=dtype), statistics, statistics
    return _parts.forward(ctx.operators, name, query, key, value, ctx.scale)


def _differentiate(
    ctx: Any, name: str, incoming: Sequence[Tensor], operands: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """Those gradients of query, key and value that are needed, in the dtype of accumulation. incoming: grad_output,
    logsumexp, its rounding error and delta (B, 1, h, w)."""
    grad_output, *statistics = incoming
    if grad_output.shape[2:].numel() == 0:
        dtype = statistics[0].dtype
        return [t.new_empty(t.shape, dtype=dtype) for t, needed in zip(operands, needs, strict=True) if needed]
    arguments = (grad_output, *operands, *(t.squeeze(1) for t in statistics), ctx.scale)
    gradients = _parts.backward(ctx.operators, name, arguments, needs)
    return [g for g, needed in zip(gradients, needs, strict=True) if needed]
