"""Exact attention of feature maps that are sharded over the ranks of a mesh."""

from ._collectives import recording
from ._shards import shard, unshard
from .channel import channel_attention, residual_channel_attention
from .criss_cross import criss_cross_attention
from .position import position_attention
from .spatial import reduce_gradients, spatially_parallel

__all__ = [
    "channel_attention",
    "criss_cross_attention",
    "position_attention",
    "recording",
    "reduce_gradients",
    "residual_channel_attention",
    "shard",
    "spatially_parallel",
    "unshard",
]
