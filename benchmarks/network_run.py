"""Runs the cells of ``modules`` and ``models`` and returns their records.

The rivals of a subject wait side by side, each in its process, and are timed in turn, round by round. What a cell needs
is known beforehand (``subjects.predicted``): a pass that does not fit the memory, or the time that is left, is not run,
and its record says why.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from . import blocks, measure, statistics, subjects, validate
from .network_cell import NetworkSpec, save_inputs
from .processes import CellFailed, CellProcess
from .subjects import PASSES, Cost, Subject

GIB = 2**30
MEMORY_SHARE = 0.9  # of the available memory, that a pass may need
SCRATCH = 1.25  # a convolution's packed copies, and softmax's copy in its backward, over the predicted bytes
TITLES = {"fused": "segattn_ops", "eager": "eager", "sdpa": "SDPA"}
LARGE_ERRORS = {"float32": 1e-4, "bfloat16": 4e-2, "float16": 5e-3, "float64": 1e-10}
SMALL_ERROR = 1e-6  # of float64 gradients, through fifty layers and batch norms
GUESS = 60e9  # FLOP/s before anything is measured
ROUND_SECONDS = 6.0  # for the rounds of a subject, with at least three
ROUNDS = (3, 9)
BEFORE_ROUNDS = 2  # times that a subject's passes take before its rounds: checks and first passes


@dataclass(frozen=True)
class Options:
    rivals: tuple[str, ...] = ("fused", "eager")
    device: str = "cpu"
    threads: int = 2
    backend: str = "native"
    rounds: int | None = None
    budget: float | None = None


def fits(cost: Cost, available: int) -> str | None:
    """None, or why the pass does not run."""
    needed = SCRATCH * cost.peak_bytes
    if needed <= MEMORY_SHARE * available:
        return None
    return f"would not fit: needs {needed / GIB:.1f} GiB, {available / GIB:.1f} GiB available"


def record(subject: Subject, rival: str, costs: dict[str, Cost], status: str, reason: str | None = None) -> dict:
    """The record of a cell, before or without running it."""
    return {
        subject.kind: subject.name,
        "height": subject.height,
        "width": subject.width,
        "positions": subject.positions,
        "batch": subject.batch,
        "dtype": subject.dtype,
        "rival": rival,
        "status": status,
        "reason": reason,
        "flop": {kind: cost.flop for kind, cost in costs.items()},
        "needed_bytes": {kind: round(SCRATCH * cost.peak_bytes) for kind, cost in costs.items()},
    }


@dataclass
class Clock:
    """The budget, and the rates by which times are predicted."""

    budget: float | None
    started: float = field(default_factory=time.monotonic)
    rates: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        return float("inf") if self.budget is None else self.budget - (time.monotonic() - self.started)

    def seconds(self, rival: str, kind: str, flop: int) -> float:
        known = self.rates.get((rival, kind)) or max(self.rates.values(), default=GUESS)
        return flop / known

    def learn(self, rival: str, kind: str, flop: int, seconds: float) -> None:
        self.rates[rival, kind] = flop / seconds

    def verdict(self, rival: str, kind: str, cost: Cost) -> str | None:
        """None, or why there is no time for the pass, once for its memory and once for its time."""
        seconds = 2 * self.seconds(rival, kind, cost.flop)
        if seconds <= self.left:
            return None
        return f"over the time budget: about {seconds:.0f} s, {max(self.left, 0):.0f} s left"


class Runner:
    """``on_cell(label, done)`` is called before and after each cell's checks, ``on_round(subject, round, of)`` before
    each round of times."""

    def __init__(
        self,
        options: Options,
        photograph=None,
        on_cell: Callable[[str, bool], None] = lambda *_: None,
        on_round: Callable[[str], None] = lambda *_: None,
    ):
        self.options, self.photograph, self.on_cell, self.on_round = options, photograph, on_cell, on_round
        self.clock = Clock(options.budget)
        self.later: list[Subject] = []

    def run(self, planned: Iterable[Subject]) -> Iterator[list[dict]]:
        """Yields the records of each subject. A wrong result raises ``validate.WrongResult``."""
        self.later = list(planned)
        while self.later:
            subject = self.later.pop(0)
            with tempfile.TemporaryDirectory(prefix="segattn-benchmark-") as folder:
                path = os.path.join(folder, "inputs.pt")
                save_inputs(path, subject, self.photograph)
                yield self._group(subject, path)

    def _group(self, subject: Subject, path: str) -> list[dict]:
        records: dict[str, dict] = {}
        cells: dict[str, CellProcess] = {}
        # Eager first: the others' errors are compared with its own.
        names = sorted(applicable(self.options.rivals, subject), key=lambda name: name != "eager")
        try:
            for name in names:
                label = f"{subject.label} {TITLES[name]}"
                self.on_cell(label, False)
                eager = records.get("eager", {}).get("errors")
                records[name], cell = self._start(subject, name, path, eager)
                if cell:
                    cells[name] = cell
                self.on_cell(label, True)
            self._time(subject, records, cells)
        finally:
            for cell in cells.values():
                cell.close()
        return [records[name] for name in self.options.rivals if name in records]

    def _start(self, subject: Subject, name: str, path: str, eager: dict | None) -> tuple[dict, CellProcess | None]:
        """A cell's record and its process, checked and its memory measured; None if no pass of it runs."""
        costs = subjects.predicted(subject, name)
        available = measure.available_bytes(self.options.device)
        not_run = {}
        for kind, cost in costs.items():
            if reason := fits(cost, available) or self.clock.verdict(name, kind, cost):
                not_run[kind] = reason
        if "forward" in not_run:
            return record(subject, name, costs, "skipped", not_run["forward"]) | {"not_run": not_run}, None
        spec = NetworkSpec(subject, name, path, self.options.device, self.options.threads, self.options.backend)
        cell = None
        try:
            cell = CellProcess(spec, timeout=120)
            errors = self._checked(subject, name, cell, costs, eager)
            state = cell.call("warm_up", timeout=300)
            first = {}
            for kind in PASSES:
                if kind in not_run:
                    continue
                limit = 120 + 10 * self.clock.seconds(name, kind, costs[kind].flop)
                first[kind] = cell.call("first_pass", kind, timeout=limit)
                self.clock.learn(name, kind, costs[kind].flop, first[kind]["seconds"])
            cell.call("keep_freed_memory")
        except (CellFailed, validate.WrongResult) as failure:
            if cell:
                cell.close()
            if name == "fused" or isinstance(failure, validate.WrongResult):
                raise
            return record(subject, name, costs, "failed", str(failure)), None
        known = all(found["bytes"] is not None for found in first.values())
        return record(subject, name, costs, "measured") | {
            "not_run": not_run,
            "errors": errors,
            "memory": {kind: found["bytes"] for kind, found in first.items()} if known else None,
            "state_bytes": state,
            "available_bytes": available,
            "first_pass": {kind: found["seconds"] for kind, found in first.items()},
        }, cell

    def _checked(self, subject: Subject, name: str, cell: CellProcess, costs: dict, eager: dict | None) -> dict:
        """The largest error of each kind; raises WrongResult for one that is too large."""
        limit = 300 + 10 * self.clock.seconds(name, "forward", costs["forward"].flop)
        found = cell.call("check", timeout=limit)
        floor = validate.FLOOR[subject.dtype]
        for path, error in found["blocks"].items():
            of_eager = (eager or {}).get("blocks", {}).get(path)
            useful = of_eager is not None and of_eager < validate.GROSS
            allowed = 2 * of_eager + floor if useful else LARGE_ERRORS[subject.dtype]
            if name == "fused" and not error <= allowed:
                raise validate.WrongResult(
                    f"{subject.label}: the output of {path or subject.name} is wrong: relative error {error:.3g}, "
                    f"allowed {allowed:.3g}"
                )
        result, error = max(found["small"].items(), key=lambda item: item[1])
        if not error <= SMALL_ERROR:
            raise validate.WrongResult(
                f"{subject.label}, {TITLES[name]}: {result} is wrong in float64 at a small size: relative error "
                f"{error:.3g}, allowed {SMALL_ERROR:.0e}"
            )
        return {"blocks": found["blocks"], "small_float64": {"output": found["small"]["output"], "worst": error}}

    def _rounds(self, once: float) -> int:
        """Rounds of a subject whose passes take ``once`` seconds, as far as the subjects that follow keep the time for
        their checks and first passes."""
        wanted = int(min(max(ROUND_SECONDS / once, ROUNDS[0]), ROUNDS[1]))
        if self.clock.budget is None:
            return wanted
        left = self.clock.left - BEFORE_ROUNDS * self._later_seconds()
        return max(0, min(wanted, int(left / once) - 1))  # the first round is discarded

    def _later_seconds(self) -> float:
        """Of one pass of each kind of all that follows."""
        available = measure.available_bytes(self.options.device)
        return sum(
            self.clock.seconds(name, kind, cost.flop)
            for subject in self.later
            for name in applicable(self.options.rivals, subject)
            for kind, cost in subjects.predicted(subject, name).items()
            if fits(cost, available) is None
        )

    def _time(self, subject: Subject, records: dict[str, dict], cells: dict[str, CellProcess]) -> None:
        passes = {name: list(records[name]["first_pass"]) for name in cells}
        once = sum(sum(records[name]["first_pass"].values()) for name in cells)
        rounds = self._rounds(max(once, 1e-9)) if self.options.rounds is None else self.options.rounds
        times: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in passes[name]} for name in cells}
        for number in range(rounds + 1 if rounds else 0):  # the first is discarded, as that after measured memory
            self.on_round(f"{subject.label}: round {number} of {rounds}" if number else f"{subject.label}: settling")
            for name, cell in cells.items():
                for kind in passes[name]:
                    seconds = cell.call("timed_pass", kind, timeout=120 + 10 * once)
                    if number:
                        times[name][kind].append(seconds)
        for name in cells:
            records[name] |= {"rounds": rounds, "ratio": {}, "drift": {}}
            for kind in passes[name]:
                figures = times[name][kind] or [records[name]["first_pass"][kind]]
                records[name][kind] = statistics.summary(figures)
                records[name]["drift"][kind] = statistics.drift(times[name][kind])
        for name in cells.keys() - {"fused"} if "fused" in cells else ():
            for kind in passes[name]:
                if kind in passes["fused"]:
                    ours, theirs = (records[of][kind]["times"] for of in ("fused", name))
                    records[name]["ratio"][kind] = statistics.ratio(ours, theirs)


def applicable(rivals: tuple[str, ...], subject: Subject) -> list[str]:
    network = subject.of.make()
    return [rival for rival in rivals if blocks.applies(network, rival)]
