"""Rows, or columns, of a sharded map that a rank needs from others: halos, and the sources of resampled rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._agreement import check_call, in_step, number_call
from ._collectives import Spec, exchange
from ._mesh import Group

Range = tuple[int, int]  # start and stop
_OP = "distributed.spatially_parallel"


def own_range(lengths: Sequence[int], index: int) -> Range:
    """The rows of a map that a rank holds. lengths: of all ranks' parts."""
    start = sum(lengths[:index])
    return start, start + lengths[index]


def fetch(
    tensor: Tensor, dim: int, group: Group | None, lengths: Sequence[int], wanted: Sequence[Sequence[Range]]
) -> Tensor:
    """The rows that this rank wants, joined in the order of its ranges. Backward, their gradients return to the ranks
    that hold the rows, which add them up in the order of the ranks.

    Args:
        tensor: this rank's rows.
        dim: along which the map is sharded.
        group: the ranks along it; None if the dimension is whole.
        lengths: of all ranks' parts.
        wanted: ranges of rows of the map for each rank. A rank may want rows of any others, and none at all.
    """
    held = [own_range(lengths, index) for index in range(len(lengths))]
    if all(list(ranges) == [own] for ranges, own in zip(wanted, held, strict=True)):
        return tensor
    own = 0 if group is None else group.index
    if all(start >= first and stop <= last for (first, last), ranges in zip(held, wanted, strict=True)
           for start, stop in ranges if stop > start):  # fmt: skip
        parts = [tensor.narrow(dim, min(start - held[own][0], lengths[own]) if stop > start else 0, stop - start)
                 for start, stop in wanted[own]]  # fmt: skip
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    rows: Tensor = _Fetch.apply(tensor, dim, group, held, wanted)
    return rows


def _overlap(one: Range, other: Range) -> Range:
    start = max(one[0], other[0])
    return start, max(start, min(one[1], other[1]))


class _Fetch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, dim: int, group: Group, held: Sequence[Range], wanted: Sequence[Sequence[Range]]
    ) -> Tensor:
        ctx.dim, ctx.group, ctx.held, ctx.wanted, ctx.shape = dim, group, held, wanted, tensor.shape
        ctx.call = number_call(group)
        own, first = group.index, held[group.index][0]

        def rows(start: int, stop: int) -> Tensor:
            return tensor.narrow(dim, start - first if stop > start else 0, stop - start)

        nothing = [rows(first, first)]
        messages = [
            nothing if index == own else [rows(*_overlap(held[own], r)) for r in ranges] or nothing
            for index, ranges in enumerate(wanted)
        ]
        overlaps = [[_overlap(of_rank, r) for r in wanted[own]] for of_rank in held]
        specs = [
            [_rows_of(tensor, dim, 0)] if index == own or not of_rank
            else [_rows_of(tensor, dim, stop - start) for start, stop in of_rank]
            for index, of_rank in enumerate(overlaps)
        ]  # fmt: skip
        with in_step(_OP, group):
            arrived = exchange(_OP, group, messages, specs).wait()
        arrived[own] = [rows(*r) for r in overlaps[own]]
        in_order = [part for of_range in zip(*arrived, strict=True) for part in of_range] if wanted[own] else nothing
        return torch.cat(in_order, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dim, group, held, own = ctx.dim, ctx.group, ctx.held, ctx.group.index
        starts = [0]
        for start, stop in ctx.wanted[own]:
            starts.append(starts[-1] + stop - start)
        nothing = [gradient.narrow(dim, 0, 0)]
        messages: list[list[Tensor]] = []
        for of_rank in held:
            pieces = []
            for place, wanted in zip(starts, ctx.wanted[own], strict=False):
                start, stop = _overlap(of_rank, wanted)
                pieces.append(gradient.narrow(dim, place + start - wanted[0] if stop > start else 0, stop - start))
            messages.append(pieces or nothing)
        overlaps = [[_overlap(held[own], r) for r in ranges] for ranges in ctx.wanted]
        specs = [
            [_rows_of(gradient, dim, 0)] if index == own or not of_rank
            else [_rows_of(gradient, dim, stop - start) for start, stop in of_rank]
            for index, of_rank in enumerate(overlaps)
        ]  # fmt: skip
        kept = messages[own]
        messages[own] = nothing
        with in_step(_OP, group):
            check_call(_OP, group, ctx.call, gradient.device)
            arrived = exchange(_OP, group, messages, specs).wait()
        arrived[own] = kept
        total = gradient.new_zeros(ctx.shape)
        for of_rank, parts in zip(overlaps, arrived, strict=True):
            for (start, stop), part in zip(of_rank, parts, strict=False):
                if stop > start:
                    total.narrow(dim, start - held[own][0], stop - start).add_(part)
        return total, None, None, None, None


def _rows_of(tensor: Tensor, dim: int, length: int) -> Spec:
    shape = list(tensor.shape)
    shape[dim] = length
    return Spec(tuple(shape), tensor.dtype)
