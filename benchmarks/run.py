"""Runs the cells of one workload after another and returns their records, the dictionaries of the JSON."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from . import measure, rivals, statistics, validate
from .cell import CellSpec, save_inputs
from .features import FeatureSource, grad_output
from .processes import CellFailed, CellProcess
from .schedule import Schedule
from .workloads import PAIRWISE, Workload, flops, recomputing_flops


@dataclass(frozen=True)
class Options:
    """Options of all cells of a run."""

    rivals: tuple[str, ...]
    device: str = "cpu"
    threads: int = 2
    backend: str = "native"
    compile_from: int = 8192  # minimum number of positions for rivals that compile
    repeats: int | None = None


def record(
    workload: Workload, rival: str, status: str, reason: str | None = None, device: str | torch.device = "cpu"
) -> dict:
    """The record of a cell before it runs; the needed bytes are those on ``device``."""
    forward, both = flops(workload)
    needed = rivals.needed_bytes(workload, rival, device)
    return {
        "op": workload.op,
        "height": workload.height,
        "width": workload.width,
        "positions": workload.positions,
        "batch": workload.batch,
        "dtype": workload.dtype,
        "channels": workload.channels,
        "query_channels": workload.widths[0],
        "value_channels": workload.widths[1],
        "rival": rival,
        "status": status,
        "reason": reason,
        "flop": {
            "forward": forward,
            "forward_backward": both,
            "forward_backward_recomputing": recomputing_flops(workload),
        },
        "needed_bytes": needed,
        "needed_extra_bytes": needed - workload.operand_bytes() - workload.result_bytes(),
    }


def not_run(
    options: Options,
    schedule: Schedule,
    workload: Workload,
    rival: str,
    available: int,
    to_come: Sequence[Workload] = (),
) -> tuple[str, str] | None:
    """The status and the reason of a cell that does not run; None if it does."""
    reason = rivals.unavailable(workload, rival, options.device)
    if reason:
        return "not available", reason
    if rivals.uses_compiler(rival) and workload.positions * workload.batch < options.compile_from:
        return "skipped", f"not compiled below {options.compile_from} positions"
    reason = schedule.verdict(workload, rival, available, to_come)
    return ("skipped", reason) if reason else None


class Runner:
    """Runs the cells of each workload: starts and checks them, measures memory, then times them in turn.

    ``on_cell(label, done)`` is called before (done False) and after (done True) each cell.
    """

    def __init__(self, options: Options, schedule: Schedule, on_cell: Callable[[str, bool], None] = lambda *_: None):
        self.options, self.schedule, self.on_cell = options, schedule, on_cell

    def run(self, workloads: Iterable[Workload], source: FeatureSource) -> Iterator[list[dict]]:
        """Yields each workload's records. A wrong fused result raises ``WrongResult``."""
        workloads = list(workloads)
        for index, workload in enumerate(workloads):
            with tempfile.TemporaryDirectory(prefix="segattn-benchmark-") as folder:
                path = os.path.join(folder, "inputs.pt")
                started = time.monotonic()
                save_inputs(path, workload, source.leaves(workload), grad_output(workload))
                # Only these references take noticeable time; at small sizes it is not proportional to the work.
                if workload.op in PAIRWISE and workload.positions >= 4096:
                    self.schedule.reference_rate = (time.monotonic() - started) / flops(workload)[1]
                yield self._group(workload, path, workloads[index + 1 :])

    def _group(self, workload: Workload, path: str, to_come: list[Workload]) -> list[dict]:
        records, cells = {}, {}
        # Eager first: the fused op's error is compared with its error.
        names = sorted(rivals.applicable(self.options.rivals, workload), key=lambda name: name != "eager")
        eager_errors = None
        try:
            for name in names:
                label = f"{workload.label} {rivals.TITLES[name]}"
                self.on_cell(label, False)
                entry, cell = self._start(workload, name, path, to_come, eager_errors)
                records[name] = entry
                if cell:
                    cells[name] = cell
                    if name == "eager":
                        eager_errors = entry["errors"]
                self.on_cell(label, True)
            self._time(workload, records, cells, to_come)
        finally:
            for cell in cells.values():
                cell.close()
        return [records[name] for name in self.options.rivals if name in records]

    def _record(self, workload: Workload, name: str, status: str, reason: str | None = None) -> dict:
        return record(workload, name, status, reason, self.options.device)

    def _start(self, workload, name, path, to_come, eager_errors) -> tuple[dict, CellProcess | None]:
        """The record of a cell and the cell, checked and its memory measured; None if it does not run."""
        available = measure.available_bytes(self.options.device)
        found = not_run(self.options, self.schedule, workload, name, available, to_come)
        if found:
            return self._record(workload, name, *found), None
        spec = CellSpec(workload, name, path, self.options.device, self.options.threads, self.options.backend)
        limit = 120 + 10 * self.schedule.predict(workload, name)
        cell = None
        try:
            cell = CellProcess(spec)
            warm_up = cell.call("warm_up", timeout=limit)
            first = cell.call("first_pass", timeout=limit)
        except CellFailed as failure:
            if cell:
                cell.close()
            if name == "fused":
                raise
            return self._record(workload, name, "failed", str(failure)), None
        passes = rivals.passes(name, self.options.device)
        self.schedule.learn(workload, name, first[passes[-1]])
        entry = self._record(workload, name, "measured") | {
            "errors": first["errors"],
            "memory": first["memory"],
            "available_bytes": available,
            "warm_up_seconds": warm_up,
            "first_pass": {kind: first[kind] for kind in passes},
        }
        if limit := rivals.limit(name, self.options.device):
            entry["note"] = limit
        if name == "fused":
            try:
                validate.check(workload, rivals.TITLES[name], first["errors"], eager_errors)
            except validate.WrongResult:
                cell.close()
                raise
        elif not validate.worst(first["errors"]) < validate.GROSS:
            entry["note"] = f"relative error {validate.worst(first['errors']):.2g}"
        return entry, cell

    def _time(self, workload: Workload, records: dict, cells: dict[str, CellProcess], to_come: list[Workload]) -> None:
        """Times the cells in turn, each once per round, so that drift of the machine affects all of them equally.

        The first round is discarded: the memory measurement before it returned all memory to the system, which made a
        recurrent criss-cross block take 310 ms instead of 120.
        """
        seconds = {name: {kind: [] for kind in records[name]["first_pass"]} for name in cells}
        round_seconds = sum(records[name]["first_pass"][kind] for name, kinds in seconds.items() for kind in kinds)
        rounds = self.options.repeats
        if rounds is None:
            rounds = self.schedule.rounds(workload, round_seconds, to_come)
        limit = 120 + 10 * round_seconds
        for counted in [False, *[True] * rounds] if rounds else []:
            for name, cell in cells.items():
                for kind, times in seconds[name].items():
                    passed = cell.call("timed_pass", kind, timeout=limit)
                    if counted:
                        times.append(passed)
        for name, kinds in seconds.items():
            records[name] |= {"rounds": rounds, "ratio": {}, "drift": {}}
            for kind, times in kinds.items():
                records[name][kind] = statistics.summary(times or [records[name]["first_pass"][kind]])
                records[name]["drift"][kind] = statistics.drift(times)
            self.schedule.learn(workload, name, records[name][list(kinds)[-1]]["median"])
        for name in seconds.keys() - {"fused"} if "fused" in seconds else ():
            for kind in seconds[name]:
                ours, theirs = (records[of][kind]["times"] for of in ("fused", name))
                records[name]["ratio"][kind] = statistics.ratio(ours, theirs)
