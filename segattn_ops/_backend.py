"""Which implementation serves a call: the native operators, or the plain PyTorch reference."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from . import _library
from ._ops import ops
from ._precision import follow_tf32_setting
from ._transforms import FUNCTIONS, under_derivative, under_transform

LIBRARIES = _library.load()

# Backend name -> operator namespace; None is the reference. Tests add the emulated CUDA kernels.
_NAMESPACES: dict[str, str | None] = {"native": ops.name, "reference": None}
_warned: set[str] = set()


def _validated(name: str) -> str:
    if name not in _NAMESPACES:
        raise ValueError(f"backend must be one of {sorted(_NAMESPACES)} (got {name!r})")
    return name


_current = _validated(os.environ.get("SEGATTN_BACKEND", "native"))


def add_backend(name: str, namespace: str) -> None:
    """Makes the operators of another namespace, which must have the schemas of csrc/ops.cpp, selectable by name."""
    _NAMESPACES[name] = namespace


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Selects the implementation within a `with` block.

    Args:
        name: "native" (the compiled kernels, where the device has any) or "reference" (plain PyTorch: slower, stores
            the attention map). The environment variable SEGATTN_BACKEND sets the default.

    The selection is global to the process, for all threads. A backward pass uses the implementation of its forward
    pass.

    Raises:
        ValueError: for another name.
    """
    global _current
    previous, _current = _current, _validated(name)
    try:
        yield
    finally:
        _current = previous


def operators(op: str, *tensors: Tensor) -> ModuleType | SimpleNamespace | None:
    """The operator namespace that serves a call of `op` with `tensors`; None if the reference does. Warns once for each
    device type if native kernels are missing. Under torch.func and in forward mode, functions of the same names."""
    namespace = _NAMESPACES[_current]
    if namespace is None:
        return None
    device_type = tensors[0].device.type
    if namespace == ops.name and not LIBRARIES.serves(device_type):
        _warn_once(device_type, f"{device_type} tensors", LIBRARIES.why_not(device_type))
        return None
    if device_type == "cuda":
        follow_tf32_setting(namespace)
    if under_transform():
        if not torch.compiler.is_compiling():
            return FUNCTIONS[namespace]
        if under_derivative():
            return None
    found: ModuleType = getattr(torch.ops, namespace)
    return found


def _warn_once(key: str, served: str, reason: str) -> None:
    if torch.compiler.is_compiling() or key in _warned:
        return
    _warned.add(key)
    warnings.warn(
        f"segattn_ops: the plain PyTorch reference serves {served}, which is slow and stores the attention map: "
        f"{reason}",
        RuntimeWarning,
        stacklevel=4,
    )
