"""Which implementation serves a call: the native operators, or the plain PyTorch reference."""

import warnings
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from . import _library, _selection
from ._ops import ops
from ._precision import follow_tf32_setting
from ._transforms import FUNCTIONS, under_derivative, under_transform

LIBRARIES = _library.load()

# Operator namespace -> a function for each of its operators and of their gradients, by name, for calls that nothing
# transforms, traces or compiles. Filled by ops/_register.py.
DIRECT: dict[str, SimpleNamespace] = {}

_warned: set[str] = set()


def operators(op: str, *tensors: Tensor) -> ModuleType | SimpleNamespace | None:
    """The operator namespace that serves a call of `op` with `tensors`; None if the reference does. Warns once for each
    device type if native kernels are missing. Functions of the same names under torch.func, in forward mode, and for
    eager calls."""
    compiling = torch.compiler.is_compiling()
    namespace = _selection.NAMESPACES[_selected_in_graph() if compiling else _selection.selected()]
    if namespace is None:
        return None
    if not tensors[0].is_cpu or "cpu" in LIBRARIES.missing:
        device_type = tensors[0].device.type
        if namespace == ops.name and not LIBRARIES.serves(device_type):
            _warn_once(device_type, f"{device_type} tensors", LIBRARIES.why_not(device_type))
            return None
        if device_type == "cuda":
            follow_tf32_setting(namespace)
    if under_transform():
        if not compiling:
            return FUNCTIONS[namespace]
        if under_derivative():
            return None
    if compiling or torch._C._is_tracing() or torch._C._are_functorch_transforms_active():
        found: ModuleType = getattr(torch.ops, namespace)
        return found
    return DIRECT[namespace]


def _selected_in_graph() -> str:
    """`_selection.selected()` where dynamo may be tracing."""
    blocks = _selection.in_graph
    return blocks[-1] if blocks else _selection.guarded


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
