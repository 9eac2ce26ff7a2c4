"""Child processes that end with their command, at a time limit or with this process, including all they started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tools.compilers import ROOT

TIMED_OUT = 124
GRACE = 4.0  # seconds between the interrupt, on which pytest writes its report, and the kill


def start(command: list[str], environment: dict | None = None, **streams) -> subprocess.Popen:
    """Starts a command under a guard (see guard.py), in its own process group, in the root of the tree."""
    guard = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py")), str(os.getpid())]
    return subprocess.Popen(
        [*guard, *command], cwd=ROOT, env=os.environ | (environment or {}), start_new_session=True, **streams
    )


def signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def end(process: subprocess.Popen) -> None:
    """Kills the process and its group."""
    signal_group(process, signal.SIGKILL)
    process.wait()


@dataclass(frozen=True)
class Finished:
    """A finished command: its exit status (:data:`TIMED_OUT` at the time limit), output and seconds."""

    status: int
    output: str
    seconds: float

    @property
    def verdict(self) -> str:
        return {0: "passed", TIMED_OUT: "stopped"}.get(self.status, "failed")

    @property
    def passed(self) -> bool | None:
        """True, False, or None where the time limit ended it."""
        return {"passed": True, "stopped": None}.get(self.verdict, False)


def run(commands: list[list[str]], seconds: float, environment: dict | None = None) -> list[Finished]:
    """Runs the commands side by side. At the time limit they are interrupted and, :data:`GRACE` seconds later, killed;
    their output is kept."""
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands]
        processes = [
            start(command, environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
            for command, file in zip(commands, files, strict=True)
        ]
        for process in processes:
            stack.callback(end, process)
        took = dict.fromkeys(range(len(processes)), 0.0)
        running, interrupted = set(took), set()
        while running:
            now = time.monotonic() - started
            for index in [i for i in running if processes[i].poll() is not None]:
                running.discard(index)
                took[index] = now
            if running and now > seconds and not interrupted:
                interrupted = set(running)
                for index in running:
                    signal_group(processes[index], signal.SIGINT)
            if running and now > seconds + GRACE:
                for index in running:
                    end(processes[index])
            time.sleep(0.02)
        results = []
        for index, (process, file) in enumerate(zip(processes, files, strict=True)):
            file.seek(0)
            status = TIMED_OUT if index in interrupted else process.returncode
            results.append(Finished(status, file.read().decode(errors="replace"), took[index]))
        return results
