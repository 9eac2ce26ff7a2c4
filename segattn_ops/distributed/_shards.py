"""Between whole feature maps and the parts of the ranks."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..ops._check import check_tensors
from ._agreement import agree, describe, in_step, tells_errors
from ._collectives import Spec, gather
from ._functions import differentiable_once
from ._mesh import Space, space_of
from .criss_cross import extents


def shard(tensor: Tensor, *, mesh: DeviceMesh) -> Tensor:
    """The part of a whole feature map that this rank holds: as even as can be, the first ranks of a dimension of the
    mesh with a row, or column, more. No communication.

    Args:
        tensor: (B, channels, H, W), the same on each rank.
        mesh: of one dimension, over which the rows are sharded, or of two, over which rows and columns are.

    Returns:
        (B, channels, h, w), contiguous. Its gradient in ``tensor`` is zero beyond the part.

    Raises:
        TypeError: for a tensor or mesh of another type.
        ValueError: for a mesh of three dimensions or more, or without this process.
        RuntimeError: for a tensor that is not (B, channels, H, W), and for a mesh of another device type.
    """
    op = "distributed.shard"
    check_tensors(op, tensor=tensor)
    space = space_of(op, mesh, tensor.device.type)
    if tensor.dim() != 4:
        raise RuntimeError(f"{op}: tensor must have 4 dimensions (got shape {list(tensor.shape)})")
    for dim, group in enumerate(space.along, 2):
        tensor = tensor.tensor_split(group.size, dim)[group.index]
    return tensor.contiguous()


@tells_errors("distributed.unshard")
def unshard(tensor: Tensor, *, mesh: DeviceMesh) -> Tensor:
    """The whole feature map from the parts of all ranks.

    Args:
        tensor: (B, channels, h, w), this rank's part.
        mesh: as of :func:`shard`.

    Returns:
        (B, channels, H, W), the same on each rank. Its gradient is taken to be the same on each rank as well, as that
        of a loss which each computes of the whole map; a rank gets its part of it, without communication.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`shard`; if the ranks' batch, channels or dtypes differ, or their
            parts do not form a map; if communication fails.
    """
    op = "distributed.unshard"
    check_tensors(op, tensor=tensor)
    space, shapes = agree(op, mesh, describe(tensor=tensor), (), _check)
    heights, widths = extents(op, space, [of_rank[0][2:] for of_rank in shapes])
    whole: Tensor = _Unshard.apply(tensor, op, space, heights, widths)
    return whole


def _check(tensor: Tensor) -> None:
    if tensor.dim() != 4:
        raise RuntimeError(f"distributed.unshard: tensor must have 4 dimensions (got shape {list(tensor.shape)})")


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tensor: Tensor, op: str, space: Space, heights: Sequence[int], widths: Sequence[int]
    ) -> Tensor:
        ctx.space, ctx.heights, ctx.widths = space, heights, widths
        specs = [[Spec((*tensor.shape[:2], h, w), tensor.dtype)] for h in heights for w in widths]
        with in_step(op, space.whole):
            parts = [part for (part,) in gather(op, space.whole, [tensor], specs)]
        columns = len(widths)
        return torch.cat([torch.cat(parts[i * columns : (i + 1) * columns], 3) for i in range(len(heights))], 2)

    @staticmethod
    @differentiable_once("distributed.unshard")
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        part = gradient.split(ctx.heights, 2)[ctx.space.along[0].index]
        if len(ctx.widths) > 1:
            part = part.split(ctx.widths, 3)[ctx.space.along[1].index]
        return part.contiguous(), None, None, None, None
