"""Bad input: an error that names op, argument, rule and the value got; the same from the reference, the kernels, fake
tensors and meta tensors."""

import ast
import inspect
import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import segattn_ops
from segattn_ops.ops import channel, criss_cross, position
from segattn_ops.ops._check import NAMES, SUPPORTED


def t(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


POSITION = {"query": t(2, 8, 5, 7), "key": t(2, 8, 3, 4), "value": t(2, 6, 3, 4), "scale": 1.0}
CHANNEL = {"query": t(2, 8, 5, 7), "key": t(2, 4, 5, 7), "value": t(2, 4, 3), "scale": 1.0}
AFFINITY = {"query": t(2, 8, 5, 7), "key": t(2, 8, 5, 7)}
AGGREGATION = {"attention": t(2, 11, 5, 7), "value": t(2, 6, 5, 7)}
CRISS_CROSS = {"query": t(2, 8, 5, 7), "key": t(2, 8, 5, 7), "value": t(2, 6, 5, 7), "scale": 1.0}

# Of the public functions: name, good arguments, the change, the message.
BAD = [
    ("position_attention", POSITION, {"query": t(2, 8)}, "query must have at least 3 dimensions"),
    ("position_attention", POSITION, {"key": t(2, 32, 3, 4)}, "key must have 8 channels like query (got 32)"),
    ("position_attention", POSITION, {"key": t(3, 8, 3, 4)}, "key must have batch size 2 like query (got 3)"),
    ("position_attention", POSITION, {"value": t(1, 6, 3, 4)}, "value must have batch size 2 like query (got 1)"),
    (
        "position_attention",
        POSITION,
        {"value": t(2, 6, 12)},
        "value must have spatial size [3, 4] like key (got [12])",
    ),
    (
        "position_attention",
        POSITION,
        {"key": t(2, 8, 0), "value": t(2, 6, 0)},
        "key must have at least 1 position (got shape [2, 8, 0])",
    ),
    (
        "position_attention",
        POSITION,
        {"query": t(2, 0, 5), "key": t(2, 0, 3, 4)},
        "query must have at least 1 channel (got shape [2, 0, 5])",
    ),
    (
        "position_attention",
        POSITION,
        {"value": t(2, 6, 3, 4, dtype=torch.float64)},
        "value must be float32 like query (got float64)",
    ),
    (
        "position_attention",
        POSITION,
        {"query": t(2, 8, 5, 7, dtype=torch.int64)},
        "query must be float16, bfloat16, float32 or float64 (got int64)",
    ),
    ("position_attention", POSITION, {"scale": math.inf}, "scale must be finite (got inf)"),
    ("position_attention", POSITION, {"scale": math.nan}, "scale must be finite (got nan)"),
    ("channel_attention", CHANNEL, {"key": t(2, 4, 7, 5)}, "key must have spatial size [5, 7] like query (got [7, 5])"),
    ("channel_attention", CHANNEL, {"value": t(2, 5, 3)}, "value must have 4 channels like key (got 5)"),
    ("channel_attention", CHANNEL, {"value": t(1, 4, 3)}, "value must have batch size 2 like query (got 1)"),
    ("channel_attention", CHANNEL, {"value": t(2, 4)}, "value must have at least 3 dimensions"),
    ("channel_attention", CHANNEL, {"key": t(2, 4, 5, 7, dtype=torch.float16)}, "key must be float32 like query"),
    ("channel_attention", CHANNEL, {"scale": -math.inf}, "scale must be finite (got -inf)"),
    (
        "channel_attention",
        CHANNEL,
        {"query": t(2, 8, 0), "key": t(2, 4, 0)},
        "query must have at least 1 position (got shape [2, 8, 0])",
    ),
    ("criss_cross_affinity", AFFINITY, {"query": t(2, 8, 35)}, "query must have 4 dimensions"),
    ("criss_cross_affinity", AFFINITY, {"key": t(2, 9, 5, 7)}, "key must have 8 channels like query (got 9)"),
    ("criss_cross_affinity", AFFINITY, {"key": t(2, 8, 7, 5)}, "key must have spatial size [5, 7] like query"),
    (
        "criss_cross_affinity",
        AFFINITY,
        {"query": t(2, 8, 0, 7), "key": t(2, 8, 0, 7)},
        "query must have a height and a width of at least 1 (got shape [2, 8, 0, 7])",
    ),
    (
        "criss_cross_aggregation",
        AGGREGATION,
        {"attention": t(2, 12, 5, 7)},
        "attention must have H + W - 1 = 11 channels (got 12)",
    ),
    ("criss_cross_aggregation", AGGREGATION, {"value": t(1, 6, 5, 7)}, "value must have batch size 2 like attention"),
    ("criss_cross_aggregation", AGGREGATION, {"value": t(2, 0, 5, 7)}, "value must have at least 1 channel"),
    ("criss_cross_attention", CRISS_CROSS, {"value": t(2, 6, 5, 6)}, "value must have spatial size [5, 7] like query"),
    ("criss_cross_attention", CRISS_CROSS, {"value": t(2, 6, 35)}, "value must have 4 dimensions"),
    ("criss_cross_attention", CRISS_CROSS, {"key": t(2, 8, 5, 7, dtype=torch.bfloat16)}, "key must be float32"),
    ("criss_cross_attention", CRISS_CROSS, {"scale": math.nan}, "scale must be finite (got nan)"),
]
PADDING = t(2, 3, 4, dtype=torch.bool)
MASKED = {**POSITION, "with_low": False, "key_padding_mask": PADDING}
SELF = {"input": t(2, 8, 5, 7), "scale": -1.0, "gamma": t(2, 8)}
TENSORS = ("query", "key", "value")
POSITION_BACKWARD = {
    "grad_output": t(2, 6, 5, 7),
    **{name: POSITION[name] for name in TENSORS},
    "output": t(2, 6, 5, 7),
    "logsumexp": t(2, 5, 7),
    "scale": 1.0,
    "output_low": t(2, 6, 5, 7),
    "logsumexp_low": t(2, 5, 7),
    "grad_logsumexp": t(2, 5, 7),
    "needs_input_grad": [True, True, True],
    "key_padding_mask": PADDING,
    "keys_complete": False,
}
PARTIAL = {**POSITION, "key_padding_mask": PADDING}
PARTIAL_BACKWARD = {
    "grad_output": t(2, 6, 5, 7),
    **{name: POSITION[name] for name in TENSORS},
    "logsumexp": t(2, 5, 7),
    "logsumexp_low": t(2, 5, 7),
    "delta": t(2, 5, 7),
    "scale": 1.0,
    "needs_input_grad": [True, True, True],
    "key_padding_mask": PADDING,
}
CHANNEL_BACKWARD = {"grad_output": t(2, 8, 3), **CHANNEL, "needs_input_grad": [True, True, True]}
SELF_BACKWARD = {"grad_output": t(2, 8, 5, 7), **SELF, "needs_input_grad": [True, True]}
ENERGY = {"query": t(2, 8, 5, 7), "key": t(2, 4, 5, 7)}
ENERGY_BACKWARD = {"grad_energy": t(2, 8, 4), **ENERGY, "needs_input_grad": [True, True]}
APPLY = {"energy": t(2, 8, 4), "value": t(2, 4, 3), "scale": 1.0}
APPLY_WITH_GAMMA = {"energy": t(2, 8, 8), "value": t(2, 8, 3), "scale": 1.0, "gamma": t(2, 8)}
APPLY_BACKWARD = {"grad_output": t(2, 8, 3), **APPLY_WITH_GAMMA, "needs_input_grad": [True, True, True]}
AFFINITY_BACKWARD = {"grad_affinity": t(2, 11, 5, 7), **AFFINITY, "needs_input_grad": [True, True]}
AGGREGATION_BACKWARD = {"grad_output": t(2, 6, 5, 7), **AGGREGATION, "needs_input_grad": [True, True]}
CRISS_CROSS_BACKWARD = {
    "grad_output": t(2, 6, 5, 7),
    **{name: CRISS_CROSS[name] for name in TENSORS},
    "output": t(2, 6, 5, 7),
    "logsumexp": t(2, 5, 7),
    "scale": 1.0,
    "logsumexp_low": t(2, 5, 7),
    "grad_logsumexp": t(2, 5, 7),
    "needs_input_grad": [True, True, True],
    "keys_complete": False,
}
CRISS_CROSS_PART_BACKWARD = {
    "grad_output": t(2, 6, 5, 7),
    **{name: CRISS_CROSS[name] for name in TENSORS},
    "logsumexp": t(2, 5, 7),
    "logsumexp_low": t(2, 5, 7),
    "delta": t(2, 5, 7),
    "scale": 1.0,
    "needs_input_grad": [True, True, True],
}


def bad(op, good, changes):
    return [(op, good, change, message) for change, message in changes]


# Of the operators that no public function reaches with such arguments.
BAD_OPERATORS = [
    *bad(
        "position_attention",
        MASKED,
        [
            ({"key_padding_mask": PADDING.byte()}, "key_padding_mask must be bool with True for padding (got uint8)"),
            ({"key_padding_mask": PADDING.mT}, "key_padding_mask must have shape [2, 3, 4] (got [2, 4, 3])"),
            ({"key_padding_mask": PADDING[:1]}, "key_padding_mask must have shape [2, 3, 4] (got [1, 3, 4])"),
            ({"key_padding_mask": PADDING.flatten(1)}, "key_padding_mask must have shape [2, 3, 4] (got [2, 12])"),
        ],
    ),
    *bad(
        "position_attention_backward",
        POSITION_BACKWARD,
        [
            ({"grad_output": t(2, 6, 5, 8)}, "grad_output must have shape [2, 6, 5, 7] like output (got [2, 6, 5, 8])"),
            ({"grad_output": t(2, 6, 5, 7).double()}, "grad_output must be float32 like query (got float64)"),
            ({"key": t(2, 32, 3, 4)}, "key must have 8 channels like query (got 32)"),
            (
                {"output": t(2)},
                "output must have at least 3 dimensions, (batch, channels, *spatial) (got shape [2])",
            ),
            ({"output": t(1, 6, 5, 7)}, "output must have batch size 2 like query (got 1)"),
            ({"output": t(2, 7, 5, 7)}, "output must have 6 channels like value (got 7)"),
            ({"output": t(2, 6, 7, 5)}, "output must have spatial size [5, 7] like query (got [7, 5])"),
            ({"output": t(2, 6, 5, 7).half()}, "output must be float32 like query (got float16)"),
            ({"logsumexp": t(2, 5, 6)}, "logsumexp must have shape [2, 5, 7] (got [2, 5, 6])"),
            ({"logsumexp": t(2, 5, 7).half()}, "logsumexp must be float32 for these inputs (got float16)"),
            ({"scale": math.nan}, "scale must be finite (got nan)"),
            ({"output_low": t(2, 6, 5, 8)}, "output_low must have shape [2, 6, 5, 7] like output (got [2, 6, 5, 8])"),
            ({"output_low": t(2, 6, 5, 7).half()}, "output_low must be float32 like query (got float16)"),
            ({"logsumexp_low": t(2, 5, 6)}, "logsumexp_low must have shape [2, 5, 7] like logsumexp (got [2, 5, 6])"),
            ({"logsumexp_low": t(2, 5, 7).double()}, "logsumexp_low must be float32 like logsumexp (got float64)"),
            ({"grad_logsumexp": t(2, 5, 6)}, "grad_logsumexp must have shape [2, 5, 7] like logsumexp (got [2, 5, 6])"),
            ({"grad_logsumexp": t(2, 5, 7).double()}, "grad_logsumexp must be float32 like logsumexp (got float64)"),
            ({"needs_input_grad": [True, True]}, "needs_input_grad must have 3 entries (got 2)"),
            ({"key_padding_mask": t(2, 3, 4)}, "key_padding_mask must be bool with True for padding (got float32)"),
            ({"key_padding_mask": PADDING.mT}, "key_padding_mask must have shape [2, 3, 4] (got [2, 4, 3])"),
        ],
    ),
    *bad(
        "position_attention_partial",
        PARTIAL,
        [
            ({"query": t(2, 8)}, "query must have at least 3 dimensions"),
            ({"key": t(2, 32, 3, 4)}, "key must have 8 channels like query (got 32)"),
            ({"value": t(2, 6, 4, 3)}, "value must have spatial size [3, 4] like key (got [4, 3])"),
            ({"value": t(2, 6, 3, 4).double()}, "value must be float32 like query (got float64)"),
            ({"scale": math.inf}, "scale must be finite (got inf)"),
            ({"key_padding_mask": PADDING.byte()}, "key_padding_mask must be bool with True for padding (got uint8)"),
            ({"key_padding_mask": PADDING.mT}, "key_padding_mask must have shape [2, 3, 4] (got [2, 4, 3])"),
        ],
    ),
    *bad(
        "position_attention_partial_backward",
        PARTIAL_BACKWARD,
        [
            ({"key": t(2, 32, 3, 4)}, "key must have 8 channels like query (got 32)"),
            ({"grad_output": t(2, 6, 5, 7).double()}, "grad_output must be float32 like query (got float64)"),
            (
                {"grad_output": t(2, 6)},
                "grad_output must have at least 3 dimensions, (batch, channels, *spatial) (got shape [2, 6])",
            ),
            ({"grad_output": t(1, 6, 5, 7)}, "grad_output must have batch size 2 like query (got 1)"),
            ({"grad_output": t(2, 7, 5, 7)}, "grad_output must have 6 channels like value (got 7)"),
            ({"grad_output": t(2, 6, 7, 5)}, "grad_output must have spatial size [5, 7] like query (got [7, 5])"),
            ({"logsumexp": t(2, 5, 6)}, "logsumexp must have shape [2, 5, 7] (got [2, 5, 6])"),
            ({"logsumexp": t(2, 5, 7).half()}, "logsumexp must be float32 for these inputs (got float16)"),
            ({"logsumexp_low": t(2, 5, 7).double()}, "logsumexp_low must be float32 like logsumexp (got float64)"),
            ({"logsumexp_low": t(2, 5)}, "logsumexp_low must have shape [2, 5, 7] like logsumexp (got [2, 5])"),
            ({"delta": t(2, 5, 7).half()}, "delta must be float32 like logsumexp (got float16)"),
            ({"delta": t(1, 5, 7)}, "delta must have shape [2, 5, 7] like logsumexp (got [1, 5, 7])"),
            ({"scale": math.nan}, "scale must be finite (got nan)"),
            ({"needs_input_grad": [True, True]}, "needs_input_grad must have 3 entries (got 2)"),
            ({"key_padding_mask": PADDING.mT}, "key_padding_mask must have shape [2, 3, 4] (got [2, 4, 3])"),
        ],
    ),
    *bad(
        "channel_attention_backward",
        CHANNEL_BACKWARD,
        [
            ({"grad_output": t(2, 8, 3).half()}, "grad_output must be float32 like query (got float16)"),
            (
                {"grad_output": t(2, 8)},
                "grad_output must have at least 3 dimensions, (batch, channels, *spatial) (got shape [2, 8])",
            ),
            ({"grad_output": t(1, 8, 3)}, "grad_output must have batch size 2 like query (got 1)"),
            ({"grad_output": t(2, 4, 3)}, "grad_output must have 8 channels like query (got 4)"),
            ({"grad_output": t(2, 8, 4)}, "grad_output must have spatial size [3] like value (got [4])"),
            ({"value": t(2, 5, 3)}, "value must have 4 channels like key (got 5)"),
            ({"scale": math.inf}, "scale must be finite (got inf)"),
            ({"needs_input_grad": []}, "needs_input_grad must have 3 entries (got 0)"),
        ],
    ),
    *bad(
        "channel_self_attention",
        SELF,
        [
            ({"input": t(2, 8).long()}, "input must be float16, bfloat16, float32 or float64 (got int64)"),
            (
                {"input": t(2, 8)},
                "input must have at least 3 dimensions, (batch, channels, *spatial) (got shape [2, 8])",
            ),
            ({"input": t(2, 0, 5)}, "input must have at least 1 channel (got shape [2, 0, 5])"),
            ({"input": t(2, 8, 0)}, "input must have at least 1 position (got shape [2, 8, 0])"),
            ({"scale": math.nan}, "scale must be finite (got nan)"),
            ({"gamma": t(2, 7)}, "gamma must have shape [2, 8] (got [2, 7])"),
            ({"gamma": t(2, 8).half()}, "gamma must be float32 for these inputs (got float16)"),
        ],
    ),
    *bad(
        "channel_self_attention_backward",
        SELF_BACKWARD,
        [
            ({"grad_output": t(2, 8, 7, 5)}, "grad_output must have shape [2, 8, 5, 7] like input (got [2, 8, 7, 5])"),
            ({"grad_output": t(2, 8, 5, 7).double()}, "grad_output must be float32 like input (got float64)"),
            ({"gamma": t(2, 1)}, "gamma must have shape [2, 8] (got [2, 1])"),
            ({"gamma": t(2, 8).half()}, "gamma must be float32 for these inputs (got float16)"),
            ({"scale": math.nan}, "scale must be finite (got nan)"),
            ({"needs_input_grad": [False] * 3}, "needs_input_grad must have 2 entries (got 3)"),
        ],
    ),
    *bad(
        "channel_energy",
        ENERGY,
        [
            ({"query": t(2, 8, 5, 7).long()}, "query must be float16, bfloat16, float32 or float64 (got int64)"),
            (
                {"query": t(2, 8)},
                "query must have at least 3 dimensions, (batch, channels, *spatial) (got shape [2, 8])",
            ),
            ({"query": t(2, 0, 5, 7)}, "query must have at least 1 channel (got shape [2, 0, 5, 7])"),
            ({"key": t(2, 4)}, "key must have at least 3 dimensions, (batch, channels, *spatial) (got shape [2, 4])"),
            ({"key": t(2, 0, 5, 7)}, "key must have at least 1 channel (got shape [2, 0, 5, 7])"),
            ({"key": t(2, 4, 5, 7).half()}, "key must be float32 like query (got float16)"),
            ({"key": t(3, 4, 5, 7)}, "key must have batch size 2 like query (got 3)"),
            ({"key": t(2, 4, 7, 5)}, "key must have spatial size [5, 7] like query (got [7, 5])"),
        ],
    ),
    *bad(
        "channel_energy_backward",
        ENERGY_BACKWARD,
        [
            ({"grad_energy": t(2, 8, 5)}, "grad_energy must have shape [2, 8, 4] (got [2, 8, 5])"),
            ({"grad_energy": t(2, 8, 4), "key": None}, "grad_energy must have shape [2, 8, 8] (got [2, 8, 4])"),
            ({"grad_energy": t(2, 8, 4).half()}, "grad_energy must be float32 for these inputs (got float16)"),
            ({"key": t(2, 4, 7, 5)}, "key must have spatial size [5, 7] like query (got [7, 5])"),
            ({"needs_input_grad": [True]}, "needs_input_grad must have 2 entries (got 1)"),
        ],
    ),
    *bad(
        "channel_apply",
        APPLY,
        [
            ({"value": t(2, 4, 3).long()}, "value must be float16, bfloat16, float32 or float64 (got int64)"),
            ({"value": t(2, 4, 3).double()}, "energy must be float64 for these inputs (got float32)"),
            ({"energy": t(2, 8, 4).half()}, "energy must be float32 for these inputs (got float16)"),
            (
                {"value": t(2, 4)},
                "value must have at least 3 dimensions, (batch, channels, *spatial) (got shape [2, 4])",
            ),
            ({"value": t(2, 0, 3)}, "value must have at least 1 channel (got shape [2, 0, 3])"),
            (
                {"energy": t(2, 8, 4, 1)},
                "energy must have 3 dimensions, (batch, channels, keys) (got shape [2, 8, 4, 1])",
            ),
            ({"energy": t(2, 0, 4)}, "energy must have at least 1 channel (got shape [2, 0, 4])"),
            ({"energy": t(1, 8, 4)}, "energy must have batch size 2 like value (got 1)"),
            ({"energy": t(2, 4, 8)}, "energy must have 4 keys, the channels of value (got 8)"),
            ({"scale": math.nan}, "scale must be finite (got nan)"),
        ],
    ),
    *bad(
        "channel_apply",
        APPLY_WITH_GAMMA,
        [
            ({"gamma": t(2, 7)}, "gamma must have shape [2, 8] (got [2, 7])"),
            ({"gamma": t(2, 8).half()}, "gamma must be float32 for these inputs (got float16)"),
            (
                {"energy": t(2, 4, 8), "gamma": t(2, 4)},
                "energy must have as many channels as keys with gamma (got shape [2, 4, 8])",
            ),
        ],
    ),
    *bad(
        "channel_apply_backward",
        APPLY_BACKWARD,
        [
            ({"grad_output": t(2, 8, 3).half()}, "grad_output must be float32 like value (got float16)"),
            (
                {"grad_output": t(2, 8)},
                "grad_output must have at least 3 dimensions, (batch, channels, *spatial) (got shape [2, 8])",
            ),
            ({"grad_output": t(1, 8, 3)}, "grad_output must have batch size 2 like value (got 1)"),
            ({"grad_output": t(2, 4, 3)}, "grad_output must have 8 channels like energy (got 4)"),
            ({"grad_output": t(2, 8, 4)}, "grad_output must have spatial size [3] like value (got [4])"),
            ({"energy": t(2, 8, 5)}, "energy must have 8 keys, the channels of value (got 5)"),
            ({"gamma": t(2, 1)}, "gamma must have shape [2, 8] (got [2, 1])"),
            ({"needs_input_grad": [True] * 2}, "needs_input_grad must have 3 entries (got 2)"),
        ],
    ),
    *bad(
        "criss_cross_affinity_backward",
        AFFINITY_BACKWARD,
        [
            ({"grad_affinity": t(2, 11, 5, 7).half()}, "grad_affinity must be float32 like query (got float16)"),
            (
                {"grad_affinity": t(2, 11, 35)},
                "grad_affinity must have 4 dimensions, (batch, channels, height, width) (got shape [2, 11, 35])",
            ),
            ({"grad_affinity": t(2, 12, 5, 7)}, "grad_affinity must have H + W - 1 = 11 channels (got 12)"),
            ({"grad_affinity": t(1, 11, 5, 7)}, "grad_affinity must have batch size 2 like query (got 1)"),
            ({"grad_affinity": t(2, 11, 7, 5)}, "grad_affinity must have spatial size [5, 7] like query (got [7, 5])"),
            ({"key": t(2, 9, 5, 7)}, "key must have 8 channels like query (got 9)"),
            ({"needs_input_grad": [True]}, "needs_input_grad must have 2 entries (got 1)"),
        ],
    ),
    *bad(
        "criss_cross_aggregation_backward",
        AGGREGATION_BACKWARD,
        [
            ({"grad_output": t(2, 5, 5, 7)}, "grad_output must have shape [2, 6, 5, 7] like value (got [2, 5, 5, 7])"),
            ({"grad_output": t(2, 6, 5, 7).double()}, "grad_output must be float32 like value (got float64)"),
            ({"attention": t(2, 12, 5, 7)}, "attention must have H + W - 1 = 11 channels (got 12)"),
            ({"needs_input_grad": [True] * 3}, "needs_input_grad must have 2 entries (got 3)"),
        ],
    ),
    *bad(
        "criss_cross_attention_backward",
        CRISS_CROSS_BACKWARD,
        [
            ({"output": t(2, 6, 7, 5)}, "output must have shape [2, 6, 5, 7] like value (got [2, 6, 7, 5])"),
            ({"output": t(2, 6, 5, 7).half()}, "output must be float32 like value (got float16)"),
            ({"grad_output": t(2, 6, 7, 5)}, "grad_output must have shape [2, 6, 5, 7] like value (got [2, 6, 7, 5])"),
            ({"grad_output": t(2, 6, 5, 7).double()}, "grad_output must be float32 like value (got float64)"),
            ({"logsumexp": t(2, 7, 5)}, "logsumexp must have shape [2, 5, 7] (got [2, 7, 5])"),
            ({"logsumexp": t(2, 5, 7).double()}, "logsumexp must be float32 for these inputs (got float64)"),
            ({"logsumexp_low": t(2, 7, 5)}, "logsumexp_low must have shape [2, 5, 7] like logsumexp (got [2, 7, 5])"),
            ({"logsumexp_low": t(2, 5, 7).double()}, "logsumexp_low must be float32 like logsumexp (got float64)"),
            ({"grad_logsumexp": t(2, 7, 5)}, "grad_logsumexp must have shape [2, 5, 7] like logsumexp (got [2, 7, 5])"),
            ({"grad_logsumexp": t(2, 5, 7).half()}, "grad_logsumexp must be float32 like logsumexp (got float16)"),
            ({"needs_input_grad": [True] * 4}, "needs_input_grad must have 3 entries (got 4)"),
            ({"scale": -math.inf}, "scale must be finite (got -inf)"),
        ],
    ),
    *(
        case
        for op in ("criss_cross_rows", "criss_cross_columns")
        for case in bad(
            op,
            CRISS_CROSS,
            [
                ({"query": t(2, 8, 35)}, "query must have 4 dimensions"),
                ({"key": t(2, 9, 5, 7)}, "key must have 8 channels like query (got 9)"),
                ({"value": t(2, 6, 5, 6)}, "value must have spatial size [5, 7] like query"),
                ({"value": t(2, 6, 5, 7).half()}, "value must be float32 like query (got float16)"),
                ({"scale": math.nan}, "scale must be finite (got nan)"),
            ],
        )
    ),
    *(
        case
        for op in ("criss_cross_rows_backward", "criss_cross_columns_backward")
        for case in bad(
            op,
            CRISS_CROSS_PART_BACKWARD,
            [
                (
                    {"grad_output": t(2, 6, 7, 5)},
                    "grad_output must have shape [2, 6, 5, 7] like value (got [2, 6, 7, 5])",
                ),
                ({"grad_output": t(2, 6, 5, 7).double()}, "grad_output must be float32 like value (got float64)"),
                ({"key": t(2, 9, 5, 7)}, "key must have 8 channels like query (got 9)"),
                ({"logsumexp": t(2, 7, 5)}, "logsumexp must have shape [2, 5, 7] (got [2, 7, 5])"),
                ({"logsumexp": t(2, 5, 7).double()}, "logsumexp must be float32 for these inputs (got float64)"),
                (
                    {"logsumexp_low": t(2, 7, 5)},
                    "logsumexp_low must have shape [2, 5, 7] like logsumexp (got [2, 7, 5])",
                ),
                ({"logsumexp_low": t(2, 5, 7).half()}, "logsumexp_low must be float32 like logsumexp (got float16)"),
                ({"delta": t(2, 5, 6)}, "delta must have shape [2, 5, 7] like logsumexp (got [2, 5, 6])"),
                ({"delta": t(2, 5, 7).double()}, "delta must be float32 like logsumexp (got float64)"),
                ({"needs_input_grad": [True]}, "needs_input_grad must have 3 entries (got 1)"),
                ({"scale": math.inf}, "scale must be finite (got inf)"),
            ],
        )
    ),
]


def ids(cases):
    return [f"{op}-{'-'.join(change)}-{i}" for i, (op, _, change, _) in enumerate(cases)]


def message_of(function, arguments) -> str:
    with pytest.raises(RuntimeError) as raised:
        function(*arguments)
    return str(raised.value)


def moved(device, arguments):
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments.values()]


@pytest.mark.parametrize(("op", "good", "change", "message"), BAD, ids=ids(BAD))
def test_bad_input(backend, op, good, change, message):
    function = getattr(segattn_ops, op)
    function(*moved(backend.device, good))
    assert f"{op}: {message}" in message_of(function, moved(backend.device, {**good, **change}))


@pytest.mark.parametrize(("op", "good", "change", "message"), BAD_OPERATORS, ids=ids(BAD_OPERATORS))
def test_bad_operator_input(kernels, op, good, change, message):
    operator = getattr(kernels.operators, op)
    operator(*moved(kernels.device, good))
    assert f"{op}: {message}" in message_of(operator, moved(kernels.device, {**good, **change}))


@pytest.mark.parametrize("mask", [PADDING.byte(), PADDING.mT], ids=["dtype", "shape"])
def test_a_bad_mask_of_the_public_function(backend, mask):
    good = dict(zip(POSITION, moved(backend.device, POSITION), strict=True))
    with pytest.raises(RuntimeError, match="^position_attention: key_padding_mask must "):
        segattn_ops.position_attention(**good, key_padding_mask=mask.to(backend.device))


FAKE = [*BAD, *BAD_OPERATORS]


@pytest.mark.parametrize(("op", "good", "change", "message"), FAKE, ids=ids(FAKE))
def test_bad_fake_input(op, good, change, message):
    """Fake and meta tensors raise what the kernels raise, to the letter."""
    operator = getattr(torch.ops.segattn, op)
    expected = message_of(operator, moved("cpu", {**good, **change})).splitlines()[0]
    assert expected.startswith(f"{op}: {message}")
    with FakeTensorMode() as mode:

        def fakes(arguments):
            return [mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in arguments.values()]

        operator(*fakes(good))
        assert message_of(operator, fakes({**good, **change})).splitlines()[0] == expected
    operator(*moved("meta", good))
    assert message_of(operator, moved("meta", {**good, **change})).splitlines()[0] == expected


GOOD = {op: good for op, good, _, _ in FAKE}


def compared_names(good):
    """The tensors whose device is compared with that of the first input."""
    tensors = [name for name, value in good.items() if isinstance(value, torch.Tensor)]
    first = next(name for name in tensors if not name.startswith("grad_"))
    return [name for name in tensors if name != first]


@pytest.mark.parametrize(("op", "name"), [(op, name) for op, good in GOOD.items() for name in compared_names(good)])
def test_a_fake_argument_on_another_device(op, name):
    arguments = dict(zip(GOOD[op], moved("meta", GOOD[op]), strict=True))
    arguments[name] = GOOD[op][name]
    rule = rf"{op}: {name} must be on device meta like \w+ \(got cpu\)"
    assert re.match(rule, message_of(getattr(torch.ops.segattn, op), arguments.values()))


CHECKS = Path(__file__).parents[2] / "csrc" / "checks"
Rules = dict[str, list[tuple[str, ...]]]  # by check function: the checks it calls, each with its arguments' names


def cpp_rules(header: str) -> Rules:
    source = re.sub(r"//.*", "", (CHECKS / header).read_text())
    functions = {}
    for name, body in re.findall(r"^inline \w+ (check_\w+)\([^{;]*\{\n(.*?)^\}", source, re.DOTALL | re.MULTILINE):
        named = dict(re.findall(r'(\w+)\{"(\w+)", \*?\w+\}', body))
        for inline in re.findall(r' \{"(\w+)", \w+\}', body):
            body = re.sub(rf' \{{"{inline}", \w+\}}', f" inline_{inline}", body)
            named[f"inline_{inline}"] = inline
        calls = re.findall(r"(check_\w+)\((.*?)\);", body, re.DOTALL)
        functions[name] = [(rule, *names(named, map(str.strip, listed.split(",")))) for rule, listed in calls]
    return functions


def python_rules(family) -> Rules:
    functions = {}
    for function in ast.parse(inspect.getsource(family)).body:
        if isinstance(function, ast.FunctionDef) and function.name.startswith("check_"):
            named, calls = {}, []
            for node in (n for statement in function.body for n in in_order(statement)):
                if isinstance(node, ast.Assign):
                    for variable, value in zip(elements(node.targets[0]), elements(node.value), strict=True):
                        if isinstance(value, ast.Call) and value.func.id == "Argument":
                            named[variable.id] = value.args[0].value
                elif isinstance(node, ast.Call) and getattr(node.func, "id", "").startswith("check_"):
                    calls.append((node.func.id, *names(named, (getattr(a, "id", None) for a in node.args))))
            functions[function.name] = calls
    return functions


def in_order(node):
    yield node
    for child in ast.iter_child_nodes(node):
        yield from in_order(child)


def elements(node):
    return node.elts if isinstance(node, ast.Tuple) else [node]


def names(named, variables):
    return [named[v] for v in variables if v in named]


@pytest.mark.parametrize("family", [position, channel, criss_cross], ids=lambda f: f.__name__.split(".")[-1])
def test_python_and_cpp_have_the_same_rules_in_the_same_order(family):
    header, python = cpp_rules(f"{family.__name__.split('.')[-1]}.h"), python_rules(family)
    # A C++ check_reach takes the sizes, the one in Python the argument that they are of.
    python = {n: [c[:2] if c[0] == "check_reach" else c for c in calls] for n, calls in python.items()}
    assert sum(map(len, header.values())) > 20
    assert python == header


def assert_residual_channel_attention_checks_input_and_gamma(device):
    x, gamma = torch.zeros(2, 8, 5, 7, device=device), torch.ones(8, device=device)
    call = segattn_ops.residual_channel_attention
    for good in (gamma, gamma[0], gamma[:1], gamma.expand(2, 8), gamma.half(), gamma.double()):
        assert call(x, good).shape == x.shape
    with pytest.raises(RuntimeError, match="residual_channel_attention: input must have at least 3 dimensions"):
        call(x[0, 0], gamma)
    with pytest.raises(RuntimeError, match=r"residual_channel_attention: scale must be finite \(got nan\)"):
        call(x, gamma, math.nan)
    rule = r"gamma must be of a shape that broadcasts to \(batch, channels\) = \[2, 8\] \(got shape \[7\]\)"
    with pytest.raises(RuntimeError, match=f"residual_channel_attention: {rule}"):
        call(x, gamma[:7])
    with pytest.raises(RuntimeError, match=r"gamma must be of a shape that broadcasts.*\(got shape \[1, 8, 1, 1\]\)"):
        call(x, gamma.view(1, 8, 1, 1))
    with pytest.raises(RuntimeError, match=r"gamma must be float16.*\(got int64\)"):
        call(x, gamma.long())
    other = "cpu" if device == "meta" else "meta"
    with pytest.raises(RuntimeError, match=rf"gamma must be on device .* like input \(got {other}\)"):
        call(x, torch.ones(8, device=other))


def assert_channel_self_attention_checks_its_one_input(device):
    x = torch.zeros(2, 8, device=device)
    with pytest.raises(RuntimeError, match="channel_self_attention: input must have at least 3 dimensions"):
        segattn_ops.channel_attention(x, x, x)
    x = torch.zeros(2, 8, 4, device=device)
    with pytest.raises(RuntimeError, match=r"channel_self_attention: scale must be finite \(got nan\)"):
        segattn_ops.channel_attention(x, x, x, math.nan)


FUNCTIONS = [
    assert_residual_channel_attention_checks_input_and_gamma,
    assert_channel_self_attention_checks_its_one_input,
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_functions_of_one_input(backend, function):
    function(backend.device)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_functions_of_one_input_on_fakes(function):
    function("meta")
    with FakeTensorMode():
        function("cpu")


@pytest.mark.parametrize("name", [name for name in NAMES if getattr(torch, name) not in SUPPORTED])
@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_a_dtype_has_the_same_name_in_both_languages(name):
    """On the CPU the kernels' check speaks, on meta tensors its twin in Python."""
    for device in ("cpu", "meta"):
        q = torch.empty(1, 2, 3, 4, dtype=getattr(torch, name), device=device)
        message = message_of(torch.ops.segattn.criss_cross_affinity, (q, q)).splitlines()[0]
        assert message == f"criss_cross_affinity: query must be float16, bfloat16, float32 or float64 (got {name})"


SCALED = [
    ("position_attention", POSITION),
    ("channel_attention", CHANNEL),
    ("criss_cross_attention", CRISS_CROSS),
    ("residual_channel_attention", {"input": t(2, 8, 5), "gamma": t(1)}),
]
SCALED_MAPS = [
    ("position_attention_map", {"query": t(2, 8, 5), "key": t(2, 8, 5), "positions": [[0]]}),
    ("criss_cross_attention_map", AFFINITY | {"positions": [[0, 0]]}),
]
each_scaled = pytest.mark.parametrize(("op", "good"), SCALED, ids=[op for op, _ in SCALED])
NO_NUMBERS = [
    (None, "NoneType"),
    ("auto", "str"),
    (True, "bool"),
    (1j, "complex"),
    (np.ones(3), "ndarray"),
    ([0.5], "list"),
    (torch.ones(2), r"a tensor of shape \[2\]"),
    (torch.tensor(1j), r"a tensor of shape \[\]"),
]


@pytest.mark.parametrize(("op", "good"), SCALED + SCALED_MAPS, ids=[op for op, _ in SCALED + SCALED_MAPS])
@pytest.mark.parametrize(("value", "got"), NO_NUMBERS, ids=[got for _, got in NO_NUMBERS])
def test_a_scale_that_is_not_a_number(backend, op, good, value, got):
    with pytest.raises(TypeError, match=rf"^{op}: scale must be a number \(got {got}\)$"):
        getattr(segattn_ops, op)(**good | {"scale": value})


@pytest.mark.parametrize(("op", "good"), SCALED + SCALED_MAPS, ids=[op for op, _ in SCALED + SCALED_MAPS])
def test_a_scale_beyond_float64(backend, op, good):
    with pytest.raises(ValueError, match=rf"^{op}: scale must be finite \(got an integer that no float64 holds\)$"):
        getattr(segattn_ops, op)(**good | {"scale": -(10**400)})


@each_scaled
def test_a_scale_that_requires_a_gradient(backend, op, good):
    """The kernels would drop it; also without autograd, so that a model that trains wrongly does not run either."""
    function, scale = getattr(segattn_ops, op), torch.nn.Parameter(torch.tensor(0.5))
    good = dict(zip(good, moved(backend.device, good), strict=True))
    message = f"^{op}: scale must be a number .got a tensor that requires a gradient.*multiply"
    for value in (scale, 2 * scale):
        with pytest.raises(TypeError, match=message):
            function(**good | {"scale": value})
    with torch.no_grad(), pytest.raises(TypeError, match=message):
        function(**good | {"scale": scale})
    with pytest.raises(TypeError, match=message):
        torch.func.jvp(lambda s: function(**good | {"scale": s}), (scale.detach(),), (scale.detach(),))
    with pytest.raises(TypeError, match=message):
        torch.func.grad(lambda s: function(**good | {"scale": s}).sum())(scale.detach())


@each_scaled
def test_any_kind_of_real_number_is_a_scale(backend, op, good):
    function = getattr(segattn_ops, op)
    good = {k: torch.randn_like(v) if isinstance(v, torch.Tensor) else v for k, v in good.items()}
    good = dict(zip(good, moved(backend.device, good), strict=True))
    expected = function(**good | {"scale": 2.0})
    for value in (2, np.float32(2), np.float64(2), np.int64(2), Fraction(4, 2), torch.tensor(2.0), torch.tensor(2)):
        assert torch.equal(function(**good | {"scale": value}), expected)
    compiled = torch.compile(lambda **arguments: function(**arguments), fullgraph=True, backend="eager")
    torch._dynamo.reset()
    torch.testing.assert_close(compiled(**good | {"scale": 2}), expected)


def test_gamma_is_a_number_or_a_tensor(backend):
    x = torch.randn(2, 8, 5, 7, device=backend.device)
    call = segattn_ops.residual_channel_attention
    expected = call(x, torch.tensor(0.5, device=backend.device), -0.1)
    for gamma in (0.5, np.float32(0.5), Fraction(1, 2)):
        assert torch.equal(call(x, gamma, -0.1), expected)
    assert torch.equal(call(x, 0), x)
    assert call(x.bfloat16(), 0.5).dtype == torch.bfloat16
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: call(x, 0.5, -0.1), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), expected)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(call(leaf, 0.5, -0.1).square().sum(), leaf)
    (wanted,) = torch.autograd.grad(call(leaf, torch.full((8,), 0.5, device=x.device), -0.1).square().sum(), leaf)
    assert torch.equal(gradient, wanted)


NOT_TENSORS = [
    ("position_attention", POSITION, "query", np.zeros((2, 8, 5, 7))),
    ("criss_cross_aggregation", AGGREGATION, "value", np.zeros(3)),
    ("position_attention", POSITION, "key", [1.0]),
    ("position_attention", POSITION, "key_padding_mask", [True]),
    ("channel_attention", CHANNEL, "query", None),
    ("criss_cross_attention", CRISS_CROSS, "value", 1.0),
    ("criss_cross_affinity", AFFINITY, "query", "q"),
    ("criss_cross_aggregation", AGGREGATION, "attention", (1,)),
    ("residual_channel_attention", {"input": t(2, 8, 5), "gamma": t(1)}, "input", np.zeros((2, 8, 5))),
    ("position_attention_map", {"query": t(2, 8, 5), "key": t(2, 8, 5), "positions": [[0]]}, "query", [1]),
    ("criss_cross_attention_map", AFFINITY | {"positions": [[0, 0]]}, "key", [1.0]),
]


@pytest.mark.parametrize(("op", "good", "name", "value"), NOT_TENSORS, ids=[case[0] for case in NOT_TENSORS])
def test_an_argument_that_is_not_a_tensor(op, good, name, value):
    wrong = type(value[0] if op == "criss_cross_attention_map" else value).__name__
    with pytest.raises(TypeError, match=rf"^{op}: {name} must be a torch.Tensor \(got {wrong}\)$"):
        getattr(segattn_ops, op)(**good | {name: value})


@pytest.mark.parametrize("gamma", [None, "0.5", [0.5], True, np.full(8, 0.5)], ids=lambda g: type(g).__name__)
def test_a_gamma_that_is_neither(gamma):
    rule = rf"gamma must be a number or a torch.Tensor \(got {type(gamma).__name__}\)"
    with pytest.raises(TypeError, match=f"^residual_channel_attention: {rule}$"):
        segattn_ops.residual_channel_attention(t(2, 8, 5), gamma)


NOT_STRIDED = {
    "sparse": lambda x: x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    "mkldnn": lambda x: x.to_mkldnn(),
}


@pytest.mark.parametrize("kind", NOT_STRIDED)
@pytest.mark.parametrize("op", ["position_attention", "channel_attention", "criss_cross_attention"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # of PyTorch about its prototypes
def test_tensors_that_are_not_strided(backend, op, kind):
    q = NOT_STRIDED[kind](torch.randn(2, 4, 3, 5))
    with pytest.raises((RuntimeError, NotImplementedError)):
        getattr(segattn_ops, op)(q, q, q)


def test_mixed_devices(backend):
    query = torch.zeros(1, 4, 3, device=backend.device)
    with pytest.raises(RuntimeError, match=r"(key must be on device|meta)"):
        segattn_ops.position_attention(query, query.to("meta"), query)
