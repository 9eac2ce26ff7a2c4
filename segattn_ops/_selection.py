"""Which backend is selected: for a thread or an asyncio task by `use_backend`, otherwise for the process."""

import inspect
import os
import sys
import threading
from contextlib import ContextDecorator, suppress
from contextvars import ContextVar
from types import TracebackType
from typing import Any

import torch

from ._ops import ops

# Backend name -> operator namespace; None is the reference. Tests add the emulated CUDA kernels.
NAMESPACES: dict[str, str | None] = {"native": ops.name, "reference": None}


def _validated(function: str, name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{function}: backend must be a string (got {type(name).__name__})")
    if name not in NAMESPACES:
        raise ValueError(f"{function}: backend must be one of {sorted(NAMESPACES)} (got {name!r})")
    return name


def add_backend(name: str, namespace: str) -> None:
    """Makes the operators of another namespace, which must have the schemas of csrc/ops.cpp, selectable by name."""
    NAMESPACES[name] = namespace


_RETURN_EARLY = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)


class use_backend(ContextDecorator):  # used as a function
    """Selects the implementation within a `with` block, or for the calls of a function that it decorates.

    Args:
        name: "native" (the compiled kernels, where the device has any) or "reference" (plain PyTorch: slower, stores
            the attention map).

    The selection is of the thread, and of the asyncio task, that enters the block. Other threads have the process's
    default, those that are started within the block too: ``torch.nn.DataParallel`` runs its replicas in such threads,
    and autograd has threads of its own on CUDA. :func:`set_default_backend` is for them. A task takes over the
    selection of the code that creates it.

    Blocks may be left in another order than that in which they were entered: the last of those that are still open
    counts. A backward pass uses the implementation of its forward pass. What ``torch.utils.checkpoint`` computes again
    in a backward pass is a forward pass: it uses what is selected then. A compiled function is compiled again for
    another selection; an exported program keeps that of its export. A block in a compiled function holds for what is
    compiled with it, not for a function called there that ``torch.compiler.disable`` marks; it can be around
    ``torch.cond`` or a checkpoint, not within.

    Raises:
        TypeError: for a name that is not a string; as a decorator of a generator or coroutine function, whose calls
            return before the body runs.
        ValueError: for another name.
        RuntimeError: if the object is entered again before it is left, or left without having been entered.
    """

    def __init__(self, name: str) -> None:
        self.name = _validated("use_backend", name)
        self._entry: _Entry | None = None

    def __call__(self, function: Any) -> Any:
        if any(returns_early(function) for returns_early in _RETURN_EARLY):
            raise TypeError(
                f"use_backend: cannot decorate {function.__name__}, a generator or coroutine function, whose calls "
                "return before the body runs; use a `with` block in it"
            )
        return super().__call__(function)

    def _recreate_cm(self) -> "use_backend":
        return use_backend(self.name)

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            in_graph.append(self.name)
            return
        if self._entry is not None:
            raise RuntimeError("use_backend: the context is entered already; make another")
        self._entry = _Entry(self.name)
        _entered.set((*_entered.get(), self._entry))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if torch.compiler.is_dynamo_compiling():
            in_graph.pop()
            return
        entry, self._entry = self._entry, None
        if entry is None:
            raise RuntimeError("use_backend: the context is left without having been entered")
        entry.left_elsewhere = entry.owner != _thread_and_task()
        _entered.set(tuple(other for other in _entered.get() if other is not entry))


def _thread_and_task() -> tuple[int, Any]:
    task = None
    if (asyncio := sys.modules.get("asyncio")) is not None:
        with suppress(RuntimeError):  # no event loop runs in this thread
            task = asyncio.current_task()
    return threading.get_ident(), task


class _Entry:
    """A block that is open.

    A context variable belongs to one thread or task. Where another one leaves the block (the garbage collector may
    close a generator there), the variable of the first still has it: then it is marked as left. In the same thread and
    task it is not, because tasks that were created within keep the selection.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.owner = _thread_and_task()
        self.left_elsewhere = False


in_graph: list[str] = []  # of the blocks in a function that dynamo traces, which cannot set a context variable
# The blocks that this thread or task has entered and not left, the last one last.
_entered: ContextVar[tuple[_Entry, ...]] = ContextVar("segattn_ops.use_backend", default=())
_default = _validated("SEGATTN_BACKEND", os.environ.get("SEGATTN_BACKEND", "native"))


def set_default_backend(name: str) -> None:
    """Selects the implementation for all threads and tasks, where no block of :func:`use_backend` is open. The
    environment variable SEGATTN_BACKEND does so at import.

    Args:
        name: as of :func:`use_backend`.

    Raises:
        TypeError: for a name that is not a string.
        ValueError: for another name.
    """
    global _default
    _default = _validated("set_default_backend", name)


def selected() -> str:
    """The name of the selected backend."""
    for entry in reversed(_entered.get()):
        if not entry.left_elsewhere:
            return entry.name
    return _default


def __getattr__(name: str) -> str:
    """The attribute `guarded` is `selected()`. Dynamo takes a module's attribute as a constant and guards it by reading
    it again, whatever computes it; the context variables themselves it traces from torch 2.14 on."""
    if name == "guarded":
        return selected()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
