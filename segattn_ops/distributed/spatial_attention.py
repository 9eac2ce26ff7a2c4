"""Rules of this package's functions: those of segattn_ops.distributed."""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .._autocast import without_autocast
from ..nn import _pairwise
from ._functions import SumOverRanks
from .channel import channel_attention, residual_channel_attention
from .criss_cross import criss_cross_attention
from .position import position_attention
from .spatial_map import SpatialMap, handles, maps_in, on_replicated, own_shape, part_of, refusal


def _is_whole(*tensors: Any) -> bool:
    return not any(m.is_sharded for m in maps_in(*tensors))


def _check(name: str, *tensors: Any) -> None:
    """All are parts of maps (B, channels, *S)."""
    for tensor in tensors:
        fits = isinstance(tensor, SpatialMap) and tensor.dims in ((-2, -1), (-1,))
        if not fits or len(own_shape(tensor)) != 2 + len(tensor.dims):
            raise refusal(name, maps_in(*tensors), "its arguments must be maps (B, channels, H, W), so it has no rule")


def _like(query: SpatialMap, made: Any) -> Any:
    """Results (B, channels, *S), of the query's positions."""
    if isinstance(made, tuple):
        return tuple(query.with_local(m) for m in made)
    return query.with_local(made)


@handles(ops.position_attention)
def _position_attention(
    func: Any, query: Any, key: Any, value: Any, scale: float = 1.0, *, num_heads: int = 1,
    key_padding_mask: Any = None, return_logsumexp: bool = False,
) -> Any:  # fmt: skip
    """With keys that are the same on each rank, a rank attends to them by itself."""
    options: dict[str, Any] = {"num_heads": num_heads, "return_logsumexp": return_logsumexp}
    if _is_whole(query, key, value, key_padding_mask):
        options["key_padding_mask"] = key_padding_mask
        return on_replicated(func, (query, key, value, scale), options)
    if _is_whole(key, value, key_padding_mask):
        _check("position_attention", query)
        options["key_padding_mask"] = part_of(key_padding_mask)
        return _like(query, ops.position_attention(part_of(query), part_of(key), part_of(value), scale, **options))
    _check("position_attention", key, value)
    if not (isinstance(query, SpatialMap) and query.is_sharded):  # the same queries on each rank
        query = key.replicated(part_of(query))
    else:
        _check("position_attention", query)
    if key_padding_mask is not None:
        if not (isinstance(key_padding_mask, SpatialMap) and key_padding_mask.dims == key.dims):
            why = "its key_padding_mask must be one, so it has no rule"
            raise refusal("position_attention", [query, key, value], why)
        options["key_padding_mask"] = part_of(key_padding_mask)
    operands = part_of(query), part_of(key), part_of(value)
    return _like(query, position_attention(*operands, mesh=key.lineage.mesh, scale=scale, **options))


@handles(ops.criss_cross_attention)
def _criss_cross_attention(
    func: Any, query: Any, key: Any, value: Any, scale: float = 1.0, *, num_heads: int = 1,
    return_logsumexp: bool = False,
) -> Any:  # fmt: skip
    options: dict[str, Any] = {"num_heads": num_heads, "return_logsumexp": return_logsumexp}
    if _is_whole(query, key, value):
        return on_replicated(func, (query, key, value, scale), options)
    _check("criss_cross_attention", query, key, value)
    operands = part_of(query), part_of(key), part_of(value)
    return _like(query, criss_cross_attention(*operands, mesh=query.lineage.mesh, scale=scale, **options))


@handles(ops.channel_attention)
def _channel_attention(func: Any, query: Any, key: Any, value: Any, scale: float = -1.0) -> Any:
    if _is_whole(query, key, value):
        return on_replicated(func, (query, key, value, scale), {})
    _check("channel_attention", query, key, value)
    operands = part_of(query), part_of(key), part_of(value)
    return _like(value, channel_attention(*operands, mesh=query.lineage.mesh, scale=scale))


@handles(ops.residual_channel_attention)
def _residual_channel_attention(func: Any, input: Any, gamma: Any, scale: float = -1.0) -> Any:
    if _is_whole(input, gamma):
        return on_replicated(func, (input, gamma, scale), {})
    _check("residual_channel_attention", input)
    if not _is_whole(gamma):
        raise refusal("residual_channel_attention", [gamma], "its gamma is one, so it has no rule")
    made = residual_channel_attention(part_of(input), part_of(gamma), mesh=input.lineage.mesh, scale=scale)
    return input.with_local(made)


@handles(_pairwise.dot_product)
def _dot_product(func: Any, theta: Any, phi: Any, g: Any) -> Any:
    """The matrix of phi and g is a sum over positions."""
    if _is_whole(theta, phi, g):
        return on_replicated(func, (theta, phi, g), {})
    _check("dot_product", theta, phi, g)
    local: Tensor = part_of(g)
    dtype = torch.promote_types(local.dtype, torch.float32)
    with without_autocast(local.device.type):
        products = local.to(dtype) @ part_of(phi).to(dtype).mT
        group = g.lineage.space.whole
        summary = SumOverRanks.apply(products, "distributed.dot_product", group) / own_shape(g)[-1]
        return theta.with_local((summary @ part_of(theta).to(dtype)).to(local.dtype))
