"""The operators of this build. kernel-builder, and tools/hf_kernels.py as it does, put another file in its place, which
names the namespace of their build: several builds can then be loaded beside each other."""

import torch

ops = torch.ops.segattn


def add_op_namespace_prefix(op_name: str) -> str:
    """The qualified name of an operator: ``segattn::op_name``."""
    return f"segattn::{op_name}"
