"""Exact attention for dense prediction (DANet, CCNet, ANN, Non-local) on CUDA and the CPU, without N x N attention
maps."""

from . import _backend, _dtensor, _flop_counters, _onnx, _ops, _position_engine
from ._build_config import build_config, library_paths
from ._flop_counters import flop_handles
from ._selection import set_default_backend, use_backend
from ._version import __version__
from .ops import (
    OPERATORS,
    channel_attention,
    criss_cross_affinity,
    criss_cross_aggregation,
    criss_cross_attention,
    criss_cross_attention_map,
    position_attention,
    position_attention_map,
    register,
    residual_channel_attention,
)

if _backend.LIBRARIES.serves("cpu"):
    register(_ops.ops.name)
    _onnx.register(_ops.ops.name, OPERATORS)
    _dtensor.register()
if _backend.LIBRARIES.serves("cuda"):
    _position_engine.follow_environment(_ops.ops.name)

from . import checkpoints, nn
from .conversion import ConversionReport, convert

__all__ = [
    "ConversionReport",
    "__version__",
    "build_config",
    "channel_attention",
    "checkpoints",
    "convert",
    "criss_cross_affinity",
    "criss_cross_aggregation",
    "criss_cross_attention",
    "criss_cross_attention_map",
    "flop_handles",
    "library_paths",
    "nn",
    "position_attention",
    "position_attention_map",
    "residual_channel_attention",
    "set_default_backend",
    "use_backend",
]

_flop_counters.register()
