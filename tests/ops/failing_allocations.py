"""Calls of which every allocation fails in turn: ``python -m tests.ops.failing_allocations BACKEND DTYPE STEP CALL...``
in a process whose allocation functions are those of failing_allocations.cpp. Prints what became of each call.

Two kinds of failure: one allocation fails, and all from one on fail until the call is over. A call of which an
allocation fails must raise a RuntimeError or MemoryError that says so. It may leave no memory allocated, and the next
call must give the same bits as one before. An allocation that torch can do without may fail unnoticed: then the call's
result is the right one.

One leak is torch's: TORCH_BOX takes the arguments over one by one, and where an allocation fails in between (a list of
bool, the count of a shared_ptr: less than 100 bytes), nobody owns the rest. torch::stable::new_empty, which the CUDA
kernels' host code calls, hands arguments over in the same way. Such leaks are counted and not a problem.
"""

import bisect
import ctypes
import functools
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
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
# Functions of ours into which torch::stable::new_empty may be inlined.
AROUND_TORCH = ("segattn::cuda::allocate", "segattn::cuda::feature_map")
# What an error must contain: our own words, torch's for a tensor, the standard library's.
READABLE = ("can't allocate memory", "cannot allocate", "bad_alloc", "bad allocation", "not enough memory")


class Hook:
    """The functions of failing_allocations.cpp in this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.segattn_arm.argtypes = [ctypes.c_int64, ctypes.c_int64]
        for name in ("disarm", "live", "places", "stack"):
            getattr(self._library, f"segattn_{name}").restype = ctypes.c_int64

    def watch(self, library: Path) -> None:
        assert self._library.segattn_watch(library.name.encode()) == 1, f"{library} is not loaded"
        self._functions = functions_of(library)

    def arm(self, first_failing: int, last_failing: int) -> None:
        self._library.segattn_arm(first_failing, last_failing)

    def disarm(self) -> int:
        return self._library.segattn_disarm()

    def failed_in_boxing(self) -> bool:
        """Whether the first allocation that failed was made by torch's code around an operator, not by the operator."""
        offsets = (ctypes.c_int64 * 64)()
        for offset in offsets[: self._library.segattn_stack(offsets)]:
            name = self._functions[bisect.bisect(self._functions, (offset,)) - 1][1]
            if "torch::stable::" in name.split("(")[0] or name.startswith(AROUND_TORCH):
                return True
            if "segattn::" in name:
                return False
        return False

    def live(self) -> int:
        return self._library.segattn_live()

    def places(self) -> int:
        """How many places in the library made a counted allocation."""
        return self._library.segattn_places(None, 0)


@functools.cache
def functions_of(library: Path) -> list[tuple[int, str]]:
    """The offset and the name of each function, in order."""
    printed = subprocess.run(["nm", "-C", str(library)], capture_output=True, text=True, check=True).stdout
    symbols = (line.split(maxsplit=2) for line in printed.splitlines() if not line.startswith(" "))
    return sorted((int(offset, 16), name) for offset, kind, name in symbols if kind in "tTwW")


def same_bits(a: Iterable[Tensor | None], b: Iterable[Tensor | None]) -> bool:
    return all(x is y if x is None or y is None else torch.equal(x, y) for x, y in zip(a, b, strict=True))


def attempt(hook: Hook, run: Callable[[], list[Tensor]], first: int, last: int) -> tuple[int, str | None, Any]:
    """The allocations that were counted, the error, the result."""
    hook.arm(first, last)
    try:
        result, message = run(), None
    except (RuntimeError, MemoryError) as error:
        result, message = None, f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        counted = hook.disarm()
    return counted, message, result


def fail_each(
    hook: Hook,
    run: Callable[[], list[Tensor]],
    forget: Callable[[], Any],
    last_of: Callable[[int], int],
    expected: list[Tensor],
    step: int,
) -> dict[str, Any]:
    """Fails allocations from the n-th to last_of(n), for every step-th n until the call makes no n-th."""
    failed, leaks_in_boxing, problems = 0, 0, []
    first = 0
    while True:
        live = []
        for _ in range(3):
            counted, error, result = attempt(hook, run, first, last_of(first))
            if counted <= first:
                return {"failed": failed, "leaks in boxing": leaks_in_boxing, "problems": problems}
            failed += 1
            if error is None and not same_bits(result, expected):
                problems.append(f"allocation {first} failed unnoticed, and the result is wrong")
            if error is not None and not any(text in error for text in READABLE):
                problems.append(f"allocation {first}: not readable: {error}")
            result = None
            in_boxing = hook.failed_in_boxing()
            if not same_bits(run(), expected):
                problems.append(f"the call after allocation {first} failed is wrong")
            gc.collect()
            forget()
            live.append(hook.live())
            # What torch keeps from the first time on, such as an error's text, is no leak: it does not grow.
            if len(live) > 1 and live[-1] <= live[-2]:
                break
        else:
            if in_boxing:
                leaks_in_boxing += 1
            else:
                problems.append(f"allocation {first} ({error}) leaks: {live} blocks are live")
        first += step


KINDS: tuple[Callable[[int], int], ...] = (lambda first: first, lambda first: ALL_LATER)


def library_of(backend: str) -> Path:
    if backend == "emulated":
        return build.build("plain", "kernels") / f"{build.library_name('plain', 'kernels')}.so"
    return _backend.LIBRARIES.paths[1]


@contextmanager
def selected(backend: str) -> Iterator[Callable[[], Any]]:
    """Gives a function that forgets what the emulator records of launches."""
    forget: Callable[[], Any] = bool  # nothing to forget
    if backend == "emulated":
        forget = build.load("plain").reset
        register_backend()
        # The emulated channel attention multiplies with torch's CPU product. oneDNN's, for 16-bit types, does not
        # check its allocations (dnnl_primitive_attr_create writes to null).
        torch.backends.mkldnn.set_flags(False)
    with segattn_ops.use_backend({"cpu": "native"}.get(backend, backend)):
        yield forget


def main(backend: str, dtype: str, step: str, *names: str) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    hook = Hook()
    report = {}
    with selected(backend) as forget:
        for name in names:
            call, inputs = BY_NAME[name], BY_NAME[name].make(getattr(torch, dtype))
            expected = call.run(*inputs)
            gc.collect()
            gc.freeze()  # the collections of fail_each see only the objects made after this
            hook.watch(library_of(backend))
            found = [
                fail_each(hook, functools.partial(call.run, *inputs), forget, last, expected, int(step))
                for last in KINDS
            ]
            report[name] = {
                "failed": sum(f["failed"] for f in found),
                "leaks in boxing": sum(f["leaks in boxing"] for f in found),
                "problems": [problem for f in found for problem in f["problems"]],
                "places": hook.places(),
            }
    print(json.dumps(report))


def preload(folder: Path) -> dict[str, str]:
    """Builds the hook and returns what the environment of a process that has it needs."""
    library = folder / "failing_allocations.so"
    command = [compiler(), "-std=c++20", "-O2", "-fPIC", "-shared", "-o", str(library), str(SOURCE)]
    subprocess.run(command, check=True)
    return {"LD_PRELOAD": str(library)}


def in_new_process(folder: Path, backend: str, dtype: str, names: Iterable[str], threads: int, step: int = 1) -> Any:
    """The report of `main`."""
    module = f"{__package__}.failing_allocations"
    done = subprocess.run(
        [sys.executable, "-m", module, backend, dtype, str(step), *names],
        cwd=ROOT,
        env=os.environ | preload(folder) | {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    # torch prints the stack of every error that crosses its C interface.
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-3000:]}"
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main(*sys.argv[1:])
