"""What every recording of a model has in common: the calls of the ops, and the modules that run when they come."""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..conversion.block import FusedBlock
from ..nn import RecurrentCrissCrossAttention


@dataclass
class Run:
    """One run of a module, from its pre-hook to its forward hook."""

    name: str
    module: nn.Module
    inputs: list[Tensor]
    calls: int = 0  # of ops with a map
    passes: list[Tensor] = field(default_factory=list)  # weights of the criss-cross attentions that form one map
    outputs: list[tuple[weakref.ref[Tensor], int]] = field(default_factory=list)  # with their versions

    @property
    def is_one_map(self) -> bool:
        """Whether all criss-cross calls of the run form one map."""
        return self.calls <= 1 or isinstance(self.module, RecurrentCrissCrossAttention)

    @property
    def key(self) -> str:
        """The name of the latest call's map."""
        first = self.calls == 1 or (bool(self.passes) and self.is_one_map)
        return self.name if first else f"{self.name}#{self.calls}"


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _version(tensor: Tensor) -> int:
    """Counts writes in place, which are not counted in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


class Recorder(TorchFunctionMode):
    """Sees every call of the public ops. Hooks keep the stack of the modules that run, for the names.

    Attributes:
        handlers: op -> what to do after its call: ``handler(run, result, *args, **kwargs)``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.handlers: dict[Any, Callable[..., None]] = {}
        self.recorded = False
        self.ran_elsewhere = False
        self.ran_originals: list[str] = []  # converted blocks whose original's forward ran
        self._thread = threading.get_ident()  # a mode does not see calls of other threads
        self.running: list[Run] = []
        self._finished: dict[str, Run] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        handler = self.handlers.get(func)
        if handler is not None and self.running:
            run = self.running[-1]
            run.calls += 1
            with torch.no_grad():
                handler(run, result, *args, **(kwargs or {}))
            self.recorded = True
        return result

    def enter(self, name: str, module: nn.Module, inputs: Iterable[Any]) -> None:
        if threading.get_ident() != self._thread:
            self.ran_elsewhere = True
            return
        if isinstance(module, FusedBlock) and module._fused_needs_original():
            self.ran_originals.append(name)
        run = Run(name, module, _tensors(inputs))
        before = self._finished.pop(name, None)
        if before is not None and before.is_one_map:
            returned = [(output(), version) for output, version in before.outputs]
            if any(x is y and _version(x) == version for x in run.inputs for y, version in returned):
                run.passes = before.passes
        self.running.append(run)

    def leave(self, module: nn.Module, output: Any) -> None:
        if threading.get_ident() != self._thread or not any(run.module is module for run in self.running):
            return
        while (run := self.running.pop()).module is not module:
            pass
        if run.passes:
            outputs = _tensors(output if isinstance(output, tuple | list) else (output,))
            run.outputs = [(weakref.ref(t), _version(t)) for t in outputs]
            self._finished[run.name] = run

    def check_recorded(self, op: str, model: nn.Module, kinds: str) -> None:
        """Raises ValueError if no call was seen, and warns if a converted block's original ran beside those seen.

        Args:
            op: the public function that records.
            kinds: of attention that it sees.
        """
        originals = (
            f"{', '.join(dict.fromkeys(self.ran_originals))} is converted, but its original's forward ran, because of "
            "dropout in training, a hook on a child or an attribute that has changed since the conversion"
        )
        if self.recorded and self.ran_originals:
            warnings.warn(f"{op}: there is a map missing: {originals}", UserWarning, stacklevel=4)
        if self.recorded:
            return
        name = type(model).__name__
        if self.ran_elsewhere:
            reason = f"{name} ran in other threads, as DataParallel on several devices does: record its module"
        elif self.ran_originals:
            reason = originals
        else:
            reason = (
                f"{name} called no {kinds} of segattn_ops. Blocks of other code are seen once segattn_ops.convert has "
                "replaced them; scripted and exported models and CUDA graphs are not seen"
            )
        raise ValueError(f"{op}: {reason}")


@contextmanager
def recording(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Lets ``recorder`` see the model's calls. Leaves no hook."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"visualize: model must be a torch.nn.Module (got {type(model).__name__})")
    handles = []

    def add_hooks(name: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            recorder.enter(name, module, (*args, *kwargs.values()))

        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            recorder.leave(module, output)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, always_call=True))

    try:
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                add_hooks(name or type(module).__name__, module)
        # A mode does not see the calls of a compiled region.
        with torch.compiler.set_stance("force_eager"), recorder:
            yield
    finally:
        for handle in handles:
            handle.remove()
