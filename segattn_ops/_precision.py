"""Passes PyTorch's TF32 setting to the CUDA kernels, which cannot read it through the stable ABI."""

import torch

from ._dynamo import constant_in_graphs

_passed: dict[str, bool] = {}  # by operator namespace; the kernels start without TF32


@constant_in_graphs
def follow_tf32_setting(namespace: str) -> bool:
    """Passes `torch.backends.cuda.matmul.fp32_precision` to the operators of `namespace` if it has changed; returns
    whether TF32 is allowed. A compiled function keeps the setting of its compilation."""
    allowed: bool = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if allowed != _passed.get(namespace, False):
        getattr(torch.ops, namespace)._set_allow_tf32(allowed)
        _passed[namespace] = allowed
    return allowed
