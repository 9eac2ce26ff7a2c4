"""Position attention by the operators of ONNX Runtime, forward only, in float32.

``onnxruntime`` is com.microsoft's ``MultiHeadAttention``, whose CPU kernel streams the keys and takes values of another
width than the query's. ``onnx_attention`` is ``Attention`` of ONNX itself (opset 23), which stores the attention map.
Both take and return tokens, (B, N, channels). The conversions from and to feature maps are not timed, in the runtime's
favour. Operands and output are shared with the runtime, not copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import rivals

OPSET, IR_VERSION = 23, 11


def tokens(operand: Tensor) -> Tensor:
    """(B, C, *S) to (B, N, C), contiguous."""
    return operand.detach().flatten(2).transpose(1, 2).contiguous()


def feature_map(output: Tensor, spatial: torch.Size) -> Tensor:
    """(B, N, C) to (B, C, *spatial)."""
    return output.transpose(1, 2).unflatten(2, spatial)


def model(rival: str, key_channels: int, value_channels: int) -> bytes:
    """One operator, for any batch and any number of queries and keys."""
    from onnx import TensorProto, helper

    def tensor(name: str, positions: str, channels: int):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", positions, channels])

    inputs = [
        tensor("query", "queries", key_channels),
        tensor("key", "keys", key_channels),
        tensor("value", "keys", value_channels),
    ]
    names = [operand.name for operand in inputs]
    opsets = [helper.make_opsetid("", OPSET)]
    if rival == "onnxruntime":
        opsets.append(helper.make_opsetid("com.microsoft", 1))
        node = helper.make_node("MultiHeadAttention", names, ["output"], domain="com.microsoft", num_heads=1, scale=1.0)
    else:
        node = helper.make_node("Attention", names, ["output"], q_num_heads=1, kv_num_heads=1, scale=1.0)
    graph = helper.make_graph([node], rival, inputs, [tensor("output", "queries", value_channels)])
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION).SerializeToString()


class Session:
    """``session(query, key, value)`` on float32 tokens.

    The runtime's threads sleep between calls: by default they spin, and take the processor from the rival that is timed
    next.

    Raises:
        ValueError: the rival is none of ONNX Runtime's.
    """

    def __init__(self, rival: str, key_channels: int, value_channels: int, threads: int):
        if rival not in rivals.RUNTIMES:
            raise ValueError(f"rival must be one of {', '.join(rivals.RUNTIMES)} (got {rival})")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(
            model(rival, key_channels, value_channels), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        import numpy as np

        output = torch.empty(*query.shape[:2], value.shape[2])
        binding = self.session.io_binding()
        for name, operand in (("query", query), ("key", key), ("value", value)):
            binding.bind_input(name, "cpu", 0, np.float32, tuple(operand.shape), operand.data_ptr())
        binding.bind_output("output", "cpu", 0, np.float32, tuple(output.shape), output.data_ptr())
        self.session.run_with_iobinding(binding)
        return output
