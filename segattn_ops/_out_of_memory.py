"""A failed allocation on a GPU as torch.OutOfMemoryError, which torch's own operators raise.

The kernels call torch through its stable ABI, where every error becomes a RuntimeError.
"""

import re

import torch

_ON_A_GPU = re.compile(r"segattn_ops: cannot allocate .*?, on cuda:(\d+): (.*)", re.DOTALL)  # csrc/torch_call.h
_NO_MESSAGE = re.compile(r"(?!.*\(originally from ).* API call failed", re.DOTALL)  # of torch, before 2.13


def out_of_memory(error: RuntimeError) -> RuntimeError | None:
    """The error to raise in place of an operator's, with its message; None where it is another error. An allocation
    also fails after an error that has ended the CUDA context, where a smaller batch is no remedy."""
    found = _ON_A_GPU.match(str(error))
    if found is None:
        return None
    device, message = int(found[1]), found[2]
    if "out of memory" in message or (_NO_MESSAGE.match(message) and _responds(device)):
        return torch.OutOfMemoryError(str(error))
    return None


def _responds(device: int) -> bool:
    try:
        torch.cuda.mem_get_info(device)
    except RuntimeError:
        return False
    return True
