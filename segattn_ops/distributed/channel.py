"""Channel attention of a sharded feature map: the energies are sums over positions, so the ranks add up theirs, C x K
numbers a sample. Backward, they add up the gradients of the energies."""

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .._autocast import autocast
from ..ops._check import Argument, check_tensors, number
from ..ops._memory_format import like_inputs
from ..ops.channel import (
    channel_apply,
    channel_energy,
    channel_factors,
    check_channel_attention,
    check_channel_self_attention,
)
from ._agreement import agree, describe, tells_errors
from ._functions import SumOverRanks
from ._tensors import local_shards


@tells_errors("distributed.channel_attention")
def channel_attention(
    query: Tensor, key: Tensor, value: Tensor, *, mesh: DeviceMesh | None = None, scale: float = -1.0
) -> Tensor:
    r""":func:`segattn_ops.channel_attention` of a feature map whose positions are sharded over the ranks of a mesh.

    Every rank of the mesh calls it with its own positions and gets their results. The ranks add up their energies; no
    feature map is sent.

    Args:
        query: (B, C, *S), the rank's own positions; float16, bfloat16, float32 or float64. Or a DTensor, as key and
            value then are. A rank may have none: a size of 0.
        key: (B, K, *S).
        value: (B, K, *T), the rank's own positions.
        mesh: of one dimension, or of two; each rank of it holds a part. Not needed with DTensors.
        scale: multiplies the energies.

    Returns:
        (B, C, *T), the rank's own part.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`segattn_ops.channel_attention` and
            :func:`segattn_ops.distributed.position_attention`.
    """
    op = "distributed.channel_attention"
    check_tensors(op, query=query, key=key, value=value)
    scale = number(op, "scale", scale)
    is_self = query is key and key is value
    mesh, local, wrap = local_shards(op, mesh, query=query, key=key, value=value)
    query, key, value = autocast(*local.values())
    space, _ = agree(op, mesh, describe(query=query, key=key, value=value), (("scale", scale),), _check)
    energy = SumOverRanks.apply(channel_energy(query, None if is_self else key), op, space.whole)
    return wrap(like_inputs(channel_apply(energy, query if is_self else value, scale), *local.values()))


def _check(query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    check_channel_attention(query, key, value, scale, "distributed.channel_attention", positions_may_be_empty=True)


@tells_errors("distributed.residual_channel_attention")
def residual_channel_attention(
    input: Tensor, gamma: Tensor | float, *, mesh: DeviceMesh | None = None, scale: float = -1.0
) -> Tensor:
    r""":func:`segattn_ops.residual_channel_attention` of a feature map whose positions are sharded over the ranks.

    Args:
        input: (B, C, *S), the rank's own positions, or a DTensor. A rank may have none.
        gamma: the factor, the same on each rank: a number, or a plain tensor that broadcasts to (B, C). Its gradient is
            the rank's own part, as that of any parameter of a sharded model; the ranks' sum is that of one process.
        mesh, scale: as of :func:`channel_attention`.

    Returns:
        (B, C, *S), the rank's own part.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`segattn_ops.residual_channel_attention` and
            :func:`segattn_ops.distributed.position_attention`.
    """
    op = "distributed.residual_channel_attention"
    check_tensors(op, input=input)
    scale = number(op, "scale", scale)
    mesh, local, wrap = local_shards(op, mesh, input=input)
    input = local["input"]
    factor, constant = (gamma, None) if isinstance(gamma, Tensor) else (None, gamma)
    arguments = describe(input=input, gamma=factor)
    options = (("scale", scale), ("constant", constant))
    space, _ = agree(op, mesh, arguments, options, _check_self)
    energy = SumOverRanks.apply(channel_energy(input), op, space.whole)
    return wrap(channel_apply(energy, input, scale, gamma))


def _check_self(input: Tensor, scale: float, constant: Any, gamma: Tensor | None = None) -> None:
    op = "distributed.residual_channel_attention"
    check_channel_self_attention(input, scale, None, op, positions_may_be_empty=True)
    channel_factors(op, constant if gamma is None else gamma, Argument("input", input), input.shape[1])
