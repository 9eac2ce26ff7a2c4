"""Calls of which every allocation fails in turn: ``python -m tests.ops.failing_allocations BACKEND DTYPE WHICH CALL...``
in a process whose allocation functions are those of failing_allocations.cpp. Prints what became of each call.

Two kinds of failure: one allocation fails, and all from one on fail until the call is over. A call of which an
allocation fails must raise a RuntimeError or MemoryError that says so. It may leave no memory allocated, and the next
call must give the same bits as one before. An allocation that torch can do without may fail unnoticed: then the call's
result is the right one."""

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import segattn_ops
from segattn_ops import _backend
from tools.compilers import ROOT, compiler

from ..emulated import register_backend
from ..emulator import build
from .every_call import BY_NAME

SOURCE = Path(__file__).with_suffix(".cpp")
ALL_LATER = 2**62
# What an error must contain: our own words, torch's for a tensor, the standard library's.
READABLE = ("can't allocate memory", "cannot allocate", "bad_alloc", "bad allocation", "not enough memory")


class Hook:
    """The functions of failing_allocations.cpp in this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.segattn_arm.argtypes = [ctypes.c_int64, ctypes.c_int64]
        for name in ("disarm", "live", "places", "live_allocators"):
            getattr(self._library, f"segattn_{name}").restype = ctypes.c_int64

    def watch(self, library: str) -> None:
        assert self._library.segattn_watch(library.encode()) == 1, f"{library} is not loaded"

    def arm(self, first_failing: int, last_failing: int) -> None:
        self._library.segattn_arm(first_failing, last_failing)

    def disarm(self) -> int:
        return self._library.segattn_disarm()

    def live(self) -> tuple[int, int]:
        """Blocks and bytes."""
        size = ctypes.c_int64()
        return self._library.segattn_live(ctypes.byref(size)), size.value

    def places(self) -> list[int]:
        offsets = (ctypes.c_int64 * 4096)()
        return list(offsets[: self._library.segattn_places(offsets, len(offsets))])

    def allocators(self) -> list[tuple[int, int]]:
        """The return address and the bytes of each live block."""
        addresses, sizes = (ctypes.c_int64 * 4096)(), (ctypes.c_int64 * 4096)()
        count = min(self._library.segattn_live_allocators(addresses, sizes, 4096), 4096)
        return list(zip(addresses[:count], sizes[:count], strict=True))


def same_bits(a: Iterable[Tensor | None], b: Iterable[Tensor | None]) -> bool:
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in zip(a, b, strict=True))


def attempt(hook: Hook, run: Callable[[], list[Tensor]], first: int, last: int) -> tuple[int, str | None, Any]:
    """The allocations that were counted, the error, the result."""
    hook.arm(first, last)
    try:
        result = run()
    except (RuntimeError, MemoryError) as error:
        counted = hook.disarm()
        return counted, f"{type(error).__name__}: {error}", None
    except BaseException:
        hook.disarm()
        raise
    return hook.disarm(), None, result


def fail_each(hook: Hook, run: Callable[[], list[Tensor]], last_of: Callable[[int], int]) -> dict[str, Any]:
    """Fails allocations from the n-th to last_of(n), for n from 0 until the call makes no n-th."""
    expected = run()
    failed, errors, problems = 0, {}, []
    for first in range(100_000):
        leaked = []
        for _ in range(3):
            before = hook.live()
            counted, error, result = attempt(hook, run, first, last_of(first))
            if counted <= first:
                break
            if error is None and not same_bits(result, expected):
                problems.append(f"allocation {first} failed unnoticed, and the result is wrong")
            result = None
            gc.collect()
            leaked.append(hook.live()[0] - before[0])
            failed += 1
            if error is not None:
                errors[error.splitlines()[0][:200]] = first
                if not any(text in error for text in READABLE):
                    problems.append(f"allocation {first}: not readable: {error.splitlines()[0][:200]}")
            if not same_bits(run(), expected):
                problems.append(f"the call after allocation {first} failed is wrong")
            # What torch keeps from the first call on, such as caches, is no leak: the same failure again adds none.
            if leaked[-1] <= 0:
                break
        if counted <= first:
            break
        if leaked[-1] > 0:
            problems.append(f"allocation {first} ({error}): {leaked} blocks leaked: {hook.allocators()[-8:]}")
    return {"failed": failed, "errors": errors, "problems": problems}


KINDS: dict[str, Callable[[int], int]] = {"one": lambda first: first, "all later": lambda first: ALL_LATER}


def library_of(backend: str) -> str:
    if backend == "emulated":
        return f"{build.library_name('plain', 'kernels')}.so"
    return f"_cpu_{_backend.LIBRARIES.cpu_capability}.abi3.so"


@contextmanager
def selected(backend: str):
    if backend == "emulated":
        build.load("plain")
        register_backend()
    with segattn_ops.use_backend({"cpu": "native"}.get(backend, backend)):
        yield


def main(backend: str, dtype: str, which: str, *names: str) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    hook = Hook()
    report = {}
    with selected(backend):
        for name in names:
            inputs = BY_NAME[name].make(getattr(torch, dtype))
            BY_NAME[name].run(*inputs)
            gc.collect()
            gc.freeze()  # the collections below see the objects made after this
            hook.watch(library_of(backend) if which == "ours" else "")
            report[name] = {kind: fail_each(hook, lambda n=name, i=inputs: BY_NAME[n].run(*i), last_of) for kind, last_of in KINDS.items()}
            report[name]["places"] = hook.places()
            print(name, file=sys.stderr, flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
