"""The suite's side of a worker process (see ``worker``), which is replaced when a request ends it."""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
import tempfile
import time

from . import children


class WorkerLost(RuntimeError):
    """The worker ended, lost its device or exceeded its time; the next request starts another one."""


class TooLong(WorkerLost):
    """The worker exceeded its time."""


class Refused(RuntimeError):
    """The request raised in the worker, which continues."""


def result_of(answer: dict) -> dict:
    """The result in a worker's answer; raises the error in it."""
    if "crashed" in answer:
        raise WorkerLost(answer["crashed"])
    if "error" in answer:
        raise Refused(answer["error"])
    return answer["result"]


class Worker:
    """A worker process: started by the first request, and again by the first request after it is lost."""

    def __init__(self, device: str, command: list[str] | None = None):
        self.command = command or [sys.executable, "-m", "benchmarks.gpu.worker", "--device", device]
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def ask(self, name: str, timeout: float, **arguments) -> dict:
        """Sends a request and returns its result.

        Raises:
            Refused: the request raised in the worker, which continues.
            WorkerLost: the worker and its device context are gone; :class:`TooLong` at the time limit.
        """
        if self.process is None:
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
            self.process = children.start(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
            )
        line = json.dumps({"call": name, "arguments": arguments}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # reading the answer then reports why
            self.process.stdin.write(line)
            self.process.stdin.flush()
        try:
            answer = json.loads(self._line(time.monotonic() + timeout))
        except WorkerLost:
            self.close()
            raise
        if "crashed" in answer:
            self.close()
        return result_of(answer)

    def _line(self, end: float) -> bytes:
        found = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not found.endswith(b"\n"):
                left = end - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise TooLong("took longer than it may and was stopped")
                part = self.process.stdout.read1(1 << 20)
                if not part:
                    raise WorkerLost(self._death())
                found += part
        return found

    def _death(self) -> str:
        status = self.process.wait(timeout=30)
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        # The guard reports a signal as 128 + its number.
        how = f"was ended by signal {status - 128}" if status > 128 else f"ended with exit status {status}"
        return f"its process {how}" + (f": {lines[-1][:200]}" if lines else "")

    def close(self) -> None:
        if self.process is not None:
            children.end(self.process)
            for stream in (self.process.stdin, self.process.stdout, self.errors):
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
            self.process = None
