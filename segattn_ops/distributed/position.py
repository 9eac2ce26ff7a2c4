"""Position attention of a sharded feature map.

Two ways to bring the keys and values of all ranks to the queries of each. The ring passes the shards from rank to rank:
a rank holds two at a time, and the next one arrives while this one is computed. The gather brings all of them at once,
in one message a rank, which costs less time for small keys. Both send the same bytes in the forward pass.

Backward, the gradients of key and value travel with their shard, in the dtype of accumulation, and are rounded once.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import _backend
from .._autocast import autocast
from ..ops._check import check_tensors, number
from ..ops._heads import check_heads, logsumexp_of_heads, merge_heads, split_heads
from ..ops._memory_format import like_inputs
from ..ops.position import check_position_attention
from . import _parts
from ._agreement import agree, check_call, describe, in_step, number_call, tells_errors
from ._collectives import Arriving, Spec, exchange, gather, shift, spec_of
from ._functions import differentiable_once, result
from ._merge import Partial, delta_of, merge, without_any_key_is_nan
from ._mesh import Group
from ._tensors import local_shards

_OP = "distributed.position_attention"
Method = Literal["auto", "ring", "gather"]
METHODS = ("auto", "ring", "gather")
GATHER_LIMIT = 64 * 2**20  # bytes of keys and values that "auto" gathers in any case


@overload
def position_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mesh: DeviceMesh | None = None,
    scale: float = 1.0,
    num_heads: int = 1,
    key_padding_mask: Tensor | None = None,
    return_logsumexp: Literal[False] = False,
    method: Method = "auto",
) -> Tensor: ...
@overload
def position_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mesh: DeviceMesh | None = None,
    scale: float = 1.0,
    num_heads: int = 1,
    key_padding_mask: Tensor | None = None,
    return_logsumexp: Literal[True],
    method: Method = "auto",
) -> tuple[Tensor, Tensor]: ...
@tells_errors(_OP)
def position_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mesh: DeviceMesh | None = None,
    scale: float = 1.0,
    num_heads: int = 1,
    key_padding_mask: Tensor | None = None,
    return_logsumexp: bool = False,
    method: Method = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    r""":func:`segattn_ops.position_attention` of a feature map whose positions are sharded over the ranks of a mesh.

    Every rank of the mesh calls it with its own positions and gets their results. Exact: up to the order of the sums
    the results are those of one process with the whole map, and the same mesh gives the same bits.

    Args:
        query: (B, E, *S), the rank's own queries; float16, bfloat16, float32 or float64. Or a DTensor, as key and value
            then are. A rank may have none: a size of 0.
        key: (B, E, *T), the rank's own keys; at least one on some rank. T need not be S.
        value: (B, C, *T).
        mesh: of one dimension, or of two; each rank of it holds a part. Not needed with DTensors.
        scale: multiplies the energies.
        num_heads: as of :func:`segattn_ops.position_attention`.
        key_padding_mask: (B, *T), bool, of the rank's own keys; with DTensors a DTensor of the shape (B, 1, *T).
        return_logsumexp: also returns the logsumexp, over the keys of all ranks.
        method: "ring", "gather", or "auto": gather up to 64 MiB of keys and values, or up to the bytes of the rank's
            own tensors if these are more, and ring above.

    Returns:
        (B, C, *S), and with ``return_logsumexp`` (B, num_heads, *S): the rank's own part, differentiable once.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`segattn_ops.position_attention`, on every rank if the arguments
            of one are wrong; for a mesh of another device type than the tensors, of three dimensions or without this
            process; if the ranks' batch, channels, dtypes, options or needed gradients differ; if communication fails,
            within the process group's timeout.

    Source: the ring is that of Liu et al., "Ring Attention with Blockwise Transformers" (2023); the merge by logsumexp
    that of Dao et al., "FlashAttention" (2022), section 3.1.
    """
    check_tensors(_OP, query=query, key=key, value=value)
    if key_padding_mask is not None:
        check_tensors(_OP, key_padding_mask=key_padding_mask)
    scale = number(_OP, "scale", scale)
    if method not in METHODS:
        raise ValueError(f"{_OP}: method must be one of {list(METHODS)} (got {method!r})")
    mesh, local, wrap = local_shards(_OP, mesh, query=query, key=key, value=value, key_padding_mask=key_padding_mask)
    mask = local["key_padding_mask"]
    if mask is not None and mask is not key_padding_mask:
        mask = mask.squeeze(1)
    query, key, value = (local[name] for name in ("query", "key", "value"))
    query, key, value = autocast(query, key, value)
    options = (("scale", scale), ("num_heads", num_heads), ("method", method), ("return_logsumexp", return_logsumexp))
    arguments = describe(query=query, key=key, value=value, key_padding_mask=mask)
    space, shapes = agree(_OP, mesh, arguments, options, _check)
    feature_maps, spatial = (query, value), query.shape[2:]
    query, key, value = (split_heads(t.flatten(2), num_heads) for t in (query, key, value))
    if mask is not None:
        mask = mask.flatten(1).repeat_interleave(num_heads, 0)
    key_counts = tuple(torch.Size(of_rank[1][2:]).numel() for of_rank in shapes)
    if sum(key_counts) == 0:
        raise RuntimeError(f"{_OP}: key must have at least 1 position on some rank (got {list(key_counts)})")
    gathers = method == "gather" or (method == "auto" and _gather_fits(shapes, query.dtype.itemsize))
    output, logsumexp = _PositionAttention.apply(query, key, value, mask, scale, space.whole, key_counts, gathers)
    output = wrap(like_inputs(merge_heads(output, num_heads).unflatten(2, spatial), *feature_maps))
    if return_logsumexp:
        return output, wrap(logsumexp_of_heads(logsumexp, num_heads).unflatten(2, spatial))
    return output


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    num_heads: int,
    method: str,
    return_logsumexp: bool,
    key_padding_mask: Tensor | None = None,
) -> None:
    check_position_attention(query, key, value, scale, key_padding_mask, _OP, is_part=True)
    check_heads(_OP, num_heads, query=query, key=key, value=value)


def _gather_fits(shapes: Sequence[Sequence[Sequence[int]]], itemsize: int) -> bool:
    """Whether the keys and values of all ranks take less memory than GATHER_LIMIT, or than the largest rank's own
    tensors. The same on each rank."""
    numel = [[torch.Size(shape).numel() for shape in of_rank[:3]] for of_rank in shapes]
    gathered = sum(key + value for _, key, value in numel)
    own = max(
        query * (1 + of_rank[2][1] / of_rank[0][1]) + key + value
        for of_rank, (query, key, value) in zip(shapes, numel, strict=True)
    )
    return gathered * itemsize <= max(GATHER_LIMIT, own * itemsize)


class _PositionAttention(torch.autograd.Function):
    """query (B, E, N), key (B, E, M), value (B, C, M), mask (B, M), all of this rank -> output (B, C, N), logsumexp
    (B, N)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        group: Group,
        key_counts: tuple[int, ...],
        gathers: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.operators = _backend.operators("position_attention", query, key, value)
        ctx.scale, ctx.group, ctx.key_counts, ctx.gathers = scale, group, key_counts, gathers
        ctx.call = number_call(group)
        keys = _Keys(group, key_counts, key, value, mask)
        with in_step(_OP, group):
            if gathers:
                output, logsumexp, low = _attend(ctx, query, keys.gathered())
            else:
                output, logsumexp, low = _attend_in_ring(ctx, query, keys)
        if mask is None:
            without_any_key_is_nan(output, logsumexp)
        ctx.save_for_backward(query, key, value, mask, output, logsumexp, low)
        ctx.set_materialize_grads(False)
        return result(output.to(query.dtype)), result(logsumexp)

    @staticmethod
    @differentiable_once(_OP)
    def backward(ctx: Any, grad_output: Tensor | None, grad_logsumexp: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, mask, output, logsumexp, low = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if grad_output is None:
            grad_output = output.new_zeros(output.shape, dtype=query.dtype)
        delta = delta_of(grad_output, output, grad_logsumexp)
        keys = _Keys(ctx.group, ctx.key_counts, key, value, mask)
        with in_step(_OP, ctx.group):
            check_call(_OP, ctx.group, ctx.call, query.device)
            differentiate = _differentiate_gathered if ctx.gathers else _differentiate_in_ring
            gradients = differentiate(ctx, grad_output.contiguous(), query, keys, (logsumexp, low, delta), needs)
        rounded = (None if g is None else g.to(query.dtype) for g in gradients)
        return *rounded, None, None, None, None, None


class _Keys:
    """The keys, values and mask of this rank, and how to get those of others."""

    def __init__(self, group: Group, counts: tuple[int, ...], key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        self.group, self.counts = group, counts
        self.own = [key, value] if mask is None else [key, value, mask]

    def specs(self, index: int) -> list[Spec]:
        """Of what a rank holds."""
        return [Spec((*t.shape[:-1], self.counts[index]), t.dtype) for t in self.own]

    def gathered(self) -> list[Tensor]:
        parts = gather(_OP, self.group, self.own, [self.specs(i) for i in range(self.group.size)])
        return [torch.cat(of_ranks, -1) for of_ranks in zip(*parts, strict=True)]

    def before(self, steps: int) -> int:
        """The rank that is so many steps before this one in the ring."""
        return (self.group.index - steps) % self.group.size

    def start_shift(self, held: Sequence[Tensor], step: int) -> Arriving | None:
        """Passes on what is held in a step of the ring, unless it is the last."""
        if step + 1 == self.group.size:
            return None
        return shift(_OP, self.group, held, self.specs(self.before(step + 1)))

    def finish_shift(self, arriving: Arriving) -> list[Tensor]:
        return arriving.wait()[self.before(1)]


def _attend(ctx: Any, query: Tensor, keys: Sequence[Tensor]) -> Partial:
    """keys: key, value and perhaps a mask."""
    key, value, *mask = keys
    return _parts.forward(
        ctx.operators, "position_attention_partial", query, key, value, ctx.scale, mask[0] if mask else None
    )


def _attend_in_ring(ctx: Any, query: Tensor, keys: _Keys) -> Partial:
    held = keys.own
    merged: Partial | None = None
    for step in range(keys.group.size):
        arriving = keys.start_shift(held, step)
        if merged is None or held[0].shape[-1] > 0:
            part = _attend(ctx, query, held)
            merged = part if merged is None else merge(merged, part)
            del part  # memory
        if arriving is not None:
            held = keys.finish_shift(arriving)
            arriving = None
    assert merged is not None
    return merged


def _differentiate(
    ctx: Any,
    grad_output: Tensor,
    query: Tensor,
    keys: Sequence[Tensor],
    statistics: tuple[Tensor, Tensor, Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of query, key and value from these keys, in the dtype of accumulation; None where not needed."""
    key, value, *mask = keys
    arguments = (grad_output, query, key, value, *statistics, ctx.scale)
    gradients = _parts.backward(
        ctx.operators, "position_attention_partial", arguments, needs, mask[0] if mask else None
    )
    return [g if needed else None for g, needed in zip(gradients, needs, strict=True)]


def _differentiate_gathered(
    ctx: Any,
    grad_output: Tensor,
    query: Tensor,
    keys: _Keys,
    statistics: tuple[Tensor, Tensor, Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    grad_query, *grad_keys = _differentiate(ctx, grad_output, query, keys.gathered(), statistics, needs)
    wanted = [g for g in grad_keys if g is not None]
    if not wanted:
        return [grad_query, None, None]
    messages = list(zip(*(g.split(keys.counts, -1) for g in wanted), strict=True))
    own = [spec_of(g) for g in messages[keys.group.index]]
    parts = exchange(_OP, keys.group, messages, [own] * keys.group.size).wait()
    sums = iter([_sum(of_ranks) for of_ranks in zip(*parts, strict=True)])
    return [grad_query, *(None if g is None else next(sums) for g in grad_keys)]


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """In the order of the ranks."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def _differentiate_in_ring(
    ctx: Any,
    grad_output: Tensor,
    query: Tensor,
    keys: _Keys,
    statistics: tuple[Tensor, Tensor, Tensor],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """A shard's gradients follow it a step behind: they leave when this rank has added its part, and arrive while the
    next shard's are computed."""
    grad_query: Tensor | None = None
    arriving_gradients: Arriving | None = None
    held = keys.own
    for step in range(keys.group.size):
        arriving = keys.start_shift(held, step)
        part_of_query, *parts = _differentiate(ctx, grad_output, query, held, statistics, needs)
        if part_of_query is not None:
            grad_query = part_of_query if grad_query is None else grad_query.add_(part_of_query)
            del part_of_query  # memory
        travelling = [g for g in parts if g is not None]
        del parts
        if arriving_gradients is not None:
            arrived = keys.finish_shift(arriving_gradients)
            travelling = [g.add_(a) for g, a in zip(travelling, arrived, strict=True)]
            arriving_gradients = None
            del arrived
        if travelling and keys.group.size > 1:
            counts = keys.counts[keys.before(step + 1)]
            specs = [Spec((*g.shape[:-1], counts), g.dtype) for g in travelling]
            arriving_gradients = shift(_OP, keys.group, travelling, specs)
            travelling.clear()
        if arriving is not None:
            held = keys.finish_shift(arriving)
            arriving = None
    if arriving_gradients is not None:
        travelling = keys.finish_shift(arriving_gradients)
    found = iter(travelling)
    return [grad_query, *(next(found) if needed else None for needed in needs[1:])]
