"""Whether the CUDA kernels may round float32 products to TF32. PyTorch's stable ABI has no way to ask for the setting,
so the kernels are told when it has changed."""

import torch

_told: dict[str, bool] = {}  # by operator namespace; untold kernels keep full precision


@torch.compiler.assume_constant_result
def follow_tf32_setting(namespace: str) -> bool:
    """Tells the operators of `namespace` what `torch.backends.cuda.matmul` says, if that is news to them. A compiled
    function has the setting of the time when it was compiled."""
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    if allowed != _told.get(namespace, False):
        getattr(torch.ops, namespace)._set_allow_tf32(allowed)
        _told[namespace] = allowed
    return allowed
