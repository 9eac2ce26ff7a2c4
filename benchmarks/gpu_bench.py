"""The GPU suite's cells, each in a worker process that is replaced when a cell ends it."""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict

from . import children, rivals
from .gpu_state import Clock, State, whole
from .gpu_work import Selection
from .run import record
from .workloads import Workload

CELL_SECONDS = 100.0  # what a cell may take, start of its process and compilation included
LEAST_SECONDS = 20.0  # less than this is not worth starting a cell in
SDPA = tuple(name for name in rivals.RIVALS if name.startswith("sdpa"))


class WorkerLost(RuntimeError):
    """The worker ended, lost its device or took too long; the next request needs another."""


class TooLong(WorkerLost):
    """The worker took longer than it may."""


class Refused(RuntimeError):
    """The worker answered that it cannot do what was asked."""


def result_of(answer: dict) -> dict:
    """The result in a worker's answer, or what it says went wrong, raised."""
    if "crashed" in answer:
        raise WorkerLost(answer["crashed"])
    if "error" in answer:
        raise Refused(answer["error"])
    return answer["result"]


class Worker:
    """A ``gpu_worker`` process: started with the first request, and anew with the first after one that lost it."""

    def __init__(self, device: str, command: list[str] | None = None):
        self.command = command or [sys.executable, "-m", "benchmarks.gpu_worker", "--device", device]
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def ask(self, name: str, timeout: float, **arguments) -> dict:
        """The answer's result.

        Raises:
            Refused: the request raised in the worker, which goes on.
            WorkerLost: the worker is gone, and with it the device's context; :class:`TooLong` at the time limit.
        """
        if self.process is None:
            self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
            self.process = children.start(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
            )
        line = json.dumps({"call": name, "arguments": arguments}).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either, which says more
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


def bench(state: State, clock: Clock, selection: Selection, device: str) -> bool | None:
    """Runs all cells of the selection that are not final yet: True if no fused one failed, None if time ran out, False
    if one did or the package's kernels for the device are not loaded, and then nothing is measured."""
    with Worker(device) as worker:
        try:
            worker.ask("require_native", min(CELL_SECONDS, max(clock.left, 1)))
        except (Refused, WorkerLost) as error:
            print(f"bench: {error}", flush=True)
            state.set_step("bench", "kernels", "failed", output=[str(error)])
            return False
        for workload in selection.workloads():
            for name in selection.rivals_of(workload):
                if state.cell(workload, name):
                    continue
                if clock.left < LEAST_SECONDS:
                    return _verdict(state, selection)
                _one(state, clock, worker, workload, name)
    return _verdict(state, selection)


def _one(state: State, clock: Clock, worker: Worker, workload: Workload, name: str) -> None:
    """Runs one cell and records how it ended."""
    refusal = state.refusal(workload, name) if name != "fused" else None
    if refusal:
        state.set_cell(record(workload, name, "skipped", refusal[:300]))
        return
    if name in SDPA:
        _choose_sdpa(state, clock, worker, workload)
    if not state.start_cell(workload, name):
        return
    eager = state.cell(workload, "eager")
    limit = min(CELL_SECONDS, clock.left)
    try:
        entry = worker.ask(
            "cell",
            limit,
            workload=asdict(workload),
            rival=name,
            eager_errors=eager.get("errors") if eager else None,
            # An eager cell that did not end well would do to this process what it did to its own.
            run_eager=name == "fused" and eager is None and not state.refusal(workload, "eager"),
        )
    except Refused as refused:  # outside of what a cell's record catches: its operands, or what is missing here
        entry = record(workload, name, "failed", str(refused))
    except TooLong as late:
        status = "failed" if limit == CELL_SECONDS else "stopped"  # or it was the suite's own time that ended
        entry = record(workload, name, status, f"after {limit:.0f} s it {late}")
    except WorkerLost as lost:
        entry = record(workload, name, "crashed", str(lost))
    state.set_cell(entry)
    print(f"{workload.label} {rivals.TITLES[name]}: {_line(entry)}", flush=True)


def _choose_sdpa(state: State, clock: Clock, worker: Worker, workload: Workload) -> None:
    """Writes down which of SDPA's backends take an op and dtype, and which one PyTorch chooses."""
    choices, key = state.pieces.setdefault("sdpa", {}), f"{workload.op} {workload.dtype}"
    if key in choices:
        return
    try:
        choices[key] = worker.ask("sdpa", min(CELL_SECONDS, clock.left), workload=asdict(workload))
    except (Refused, WorkerLost) as error:
        choices[key] = {"unknown": str(error)}


def _verdict(state: State, selection: Selection) -> bool | None:
    verdicts = []
    for workload in selection.workloads():
        for name in selection.rivals_of(workload):
            found = state.cell(workload, name)
            bad = found and name == "fused" and found["status"] not in ("measured", "skipped")
            verdicts.append(None if found is None else not bad)
    return whole(verdicts)


def _line(entry: dict) -> str:
    if entry["status"] != "measured":
        return f"{entry['status']}, {entry['reason']}"
    return ", ".join(f"{kind} {entry[kind]['median'] * 1e3:.3f} ms" for kind in ("forward", "backward"))
