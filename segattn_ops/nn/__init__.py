"""Modules of DANet, CCNet, Non-local, ANN, DRANet and DFN on the fused ops, under the official parameter names."""

from .asymmetric import AFNB, APNB, AsymmetricAttention, PyramidPooling
from .channel import ChannelAttention
from .compact import (
    CompactChannelAttention,
    CompactPositionAttention,
    CompactPositionEncoder,
    CrossLevelGatingDecoder,
)
from .criss_cross import CrissCrossAttention, RecurrentCrissCrossAttention
from .da_module import DAModule
from .non_local import NonLocal1d, NonLocal2d, NonLocal3d
from .position import PositionAttention
from .refinement import ChannelAttentionBlock, RefinementResidualBlock

__all__ = [
    "AFNB",
    "APNB",
    "AsymmetricAttention",
    "ChannelAttention",
    "ChannelAttentionBlock",
    "CompactChannelAttention",
    "CompactPositionAttention",
    "CompactPositionEncoder",
    "CrissCrossAttention",
    "CrossLevelGatingDecoder",
    "DAModule",
    "NonLocal1d",
    "NonLocal2d",
    "NonLocal3d",
    "PositionAttention",
    "PyramidPooling",
    "RecurrentCrissCrossAttention",
    "RefinementResidualBlock",
]
