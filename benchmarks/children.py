"""Child processes that end: with their command, at their time limit, or with this process, and all they started too."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# By path: importing it from the package would load the libraries into a process that is to build them.
BUILD_TOOLS = runpy.run_path(str(ROOT / "segattn_ops" / "_build_tools.py"))
TIMED_OUT = 124
GRACE = 4.0  # seconds between the interrupt, at which pytest writes its report, and the kill


def start(command: list[str], environment: dict | None = None, **streams) -> subprocess.Popen:
    """The command under a guard (see guard.py), in a process group of its own, in the root of the tree."""
    guard = [sys.executable, "-I", "-S", str(Path(__file__).with_name("guard.py")), str(os.getpid())]
    return subprocess.Popen(
        [*guard, *command], cwd=ROOT, env=os.environ | (environment or {}), start_new_session=True, **streams
    )


def signal_group(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def end(process: subprocess.Popen) -> None:
    """Kills the process and everything of its group."""
    signal_group(process, signal.SIGKILL)
    process.wait()


@dataclass(frozen=True)
class Finished:
    """How a command ended: its exit status (:data:`TIMED_OUT` where the time limit ended it), output and seconds."""

    status: int
    output: str
    seconds: float


def run(commands: list[list[str]], seconds: float, environment: dict | None = None) -> list[Finished]:
    """Runs the commands side by side and waits for all. At the time limit they are interrupted, and killed if they do
    not end then; what they had printed is kept."""
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
