"""A failed allocation on a GPU as torch.OutOfMemoryError, which torch's own operators raise.

The kernels call torch through its stable ABI, where every error becomes a RuntimeError.
"""

import re

import torch

_ON_A_GPU = re.compile(r"segattn_ops: cannot allocate .*, on cuda:\d+: ")  # csrc/torch_call.h


def out_of_memory(error: RuntimeError) -> RuntimeError | None:
    """The error to raise in place of an operator's, with its message; None where it is another error."""
    return torch.OutOfMemoryError(str(error)) if _ON_A_GPU.match(str(error)) else None
