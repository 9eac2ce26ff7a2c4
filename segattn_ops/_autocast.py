"""Autocast for the ops, applied when one is called."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ._dynamo import constant_in_graphs


@constant_in_graphs
def has_autocast(device_type: str) -> bool:
    """Whether autocast exists for the device type. Dynamo of torch 2.10 and 2.11 cannot trace the query, so it calls
    this function at compile time instead."""
    return torch.amp.is_autocast_available(device_type)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype if autocast is enabled for their device, else unchanged; float64 and integer
    tensors are never converted. A matmul of PyTorch does the same.

    A registered autocast rule (``torch.library.register_autocast``) would fix one dtype in advance, while the user
    chooses it with each autocast context."""
    if not torch._C._is_any_autocast_enabled():  # 0.7 us faster than the query for a device
        return tensors
    device_type = tensors[0].device.type
    if not has_autocast(device_type) or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.dtype != torch.float64 and t.is_floating_point() else t for t in tensors)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Disables autocast in a `with` block: it would round the reference's float32 steps to 16 bits."""
    return torch.autocast(device_type, enabled=False) if has_autocast(device_type) else nullcontext()
