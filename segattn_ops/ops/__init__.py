"""The ops: public functions, and the Python side of their operators."""

from . import channel, criss_cross, position
from ._register import Operator
from ._register import register as _register
from .channel import channel_apply, channel_attention, channel_energy, residual_channel_attention
from .criss_cross import (
    criss_cross_affinity,
    criss_cross_aggregation,
    criss_cross_attention,
    criss_cross_attention_map,
    criss_cross_columns,
    criss_cross_rows,
)
from .position import (
    position_attention,
    position_attention_map,
    position_attention_partial,
)

OPERATORS = (*position.OPERATORS, *channel.OPERATORS, *criss_cross.OPERATORS)

__all__ = [
    "OPERATORS",
    "Operator",
    "channel_apply",
    "channel_attention",
    "channel_energy",
    "criss_cross_affinity",
    "criss_cross_aggregation",
    "criss_cross_attention",
    "criss_cross_attention_map",
    "criss_cross_columns",
    "criss_cross_rows",
    "position_attention",
    "position_attention_map",
    "position_attention_partial",
    "register",
    "residual_channel_attention",
]


def register(namespace: str) -> None:
    """Registers fake, autograd, vmap and FLOP rules for a namespace with the schemas of csrc/ops.cpp."""
    _register(namespace, OPERATORS)
