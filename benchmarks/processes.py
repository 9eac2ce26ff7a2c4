"""A cell in its own process, driven over a pipe.

The processes are forked from a server that has imported torch and started no thread: a cell starts in a tenth of a
second and holds no other cell's allocations. The cells of one workload exist side by side, so that their timed passes
can be interleaved; a waiting cell holds its operands and is idle.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import traceback

from . import measure
from .cell import CellSpec, backend

_PRELOAD = ["benchmarks.preload"]


class CellFailed(RuntimeError):
    """A cell raised, died or took too long; the message says which."""


def _serve(connection, spec: CellSpec) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller ends the cell
    try:
        if spec.device == "cpu":
            measure.return_freed_memory_at_once()
        with backend(spec):
            cell = spec.make()
            connection.send(("ok", None))
            while (request := connection.recv()) is not None:
                name, arguments = request
                connection.send(("ok", getattr(cell, name)(*arguments)))
    except (EOFError, BrokenPipeError):
        return  # the parent is gone
    except BaseException as error:
        connection.send(("error", f"{type(error).__name__}: {error}", traceback.format_exc()))


def start_server() -> None:
    """Starts the server, which imports what the cells need in the background. It inherits that interrupts are ignored:
    the caller handles them."""
    from multiprocessing import forkserver

    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, handler)


class CellProcess:
    """The caller's side of a cell: calls methods of what ``spec.make()`` returns by name, with a time limit."""

    def __init__(self, spec: CellSpec, timeout: float = 60.0):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self.spec = spec
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
        self._process.start()
        theirs.close()
        self._answer(timeout)

    def call(self, name: str, *arguments, timeout: float = 120.0):
        """The result of the cell's method; raises :class:`CellFailed`."""
        try:
            self._connection.send((name, arguments))
        except (BrokenPipeError, OSError) as error:
            raise CellFailed(self._death()) from error
        return self._answer(timeout)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError, OSError):
            self._connection.send(None)
        self._process.join(timeout=5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()

    def _answer(self, timeout: float):
        if not self._connection.poll(timeout):
            self._process.kill()
            raise CellFailed(f"took more than {timeout:.0f} s and was stopped")
        try:
            status, *rest = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise CellFailed(self._death()) from error
        if status == "error":
            message, trace = rest
            failure = CellFailed(message.splitlines()[0])
            failure.add_note(trace) if hasattr(failure, "add_note") else None
            raise failure
        return rest[0]

    def _death(self) -> str:
        self._process.join(timeout=5)
        code = self._process.exitcode
        reason = "was killed, most likely for lack of memory" if code == -9 else f"ended with exit code {code}"
        return f"the cell's process {reason}"
