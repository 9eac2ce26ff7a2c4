"""Decides which cells run, and how often, within a time budget and the available memory.

Sizes go from small to large, so that a cell's rate at one size predicts its time at the next. A rival runs if its
attention maps fit in memory, and time is left for the fused op at every later size and for the REQUIRED rivals at the
size FOCUS, where they are always repeated. The report names each skipped cell and the reason.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from .rivals import RIVALS, applicable, needed_bytes, passes, unavailable, uses_compiler
from .workloads import Workload, flops

GIB = 2**30
MEMORY_SHARE = 0.9  # of the available memory, that a cell may need
START_SECONDS = 0.4  # forking, loading operands, warming up
COMPILE_SECONDS = 6.0  # torch.compile of one cell, forward and backward
CHEAP = 0.015  # of the budget: a cell that takes less runs regardless, since early predictions are guesses
GUESS = 60e9  # FLOP/s of a cell without a measured rate
TIMED_SECONDS = 5.0  # for the repeats of one workload, with at least three rounds
ROUNDS = (3, 9)
SINGLE_SECONDS = 18.0  # a round longer than this is not repeated
FOCUS = (97, 97)  # the papers' size, which every op is judged at
REQUIRED = ("fused", "eager", "sdpa", "eager_onednn", "mmcv", "onnxruntime")  # of the rivals of a run, there


@dataclass
class Schedule:
    """Clock, rates and decisions of one run. ``budget`` is in seconds from creation; None for no limit."""

    budget: float | None
    device: str = "cpu"
    rivals: tuple[str, ...] = REQUIRED
    reference_rate: float = 0.0  # seconds of the latest float64 reference per FLOP of its workload
    rates: dict[tuple[str, str, str], float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def _flops(self, workload: Workload, rival: str) -> int:
        """Of the longest pass that the rival has."""
        return flops(workload)["forward_backward" in passes(rival, self.device)]

    def predict(self, workload: Workload, rival: str) -> float:
        """Seconds of one forward + backward, or of one forward if the rival has no other pass."""
        rate = self.rates.get((workload.op, rival, workload.dtype)) or self.rates.get(
            (workload.op, "eager", workload.dtype), GUESS
        )
        return self._flops(workload, rival) / rate

    def learn(self, workload: Workload, rival: str, seconds: float) -> None:
        """Stores the rate of the longest pass that the rival has, for later sizes."""
        self.rates[workload.op, rival, workload.dtype] = self._flops(workload, rival) / seconds

    def learn_from(self, records: list[dict]) -> int:
        """Learns the rates of the measured cells of a report, and returns their number."""
        found = [entry for entry in records if entry["status"] == "measured" and entry["rival"] in RIVALS]
        for entry in found:
            kind = passes(entry["rival"], self.device)[-1]
            if entry.get(kind):
                self.learn(Workload.of(entry), entry["rival"], entry[kind]["median"])
        return len(found)

    def required(self, workload: Workload) -> list[str]:
        """The rivals that run whatever the budget, if they fit."""
        if (workload.height, workload.width) != FOCUS:
            return ["fused"]
        chosen = applicable(tuple(name for name in REQUIRED if name in self.rivals), workload)
        return [name for name in chosen if not unavailable(workload, name, self.device)]

    def _repeats(self, workload: Workload, rival: str, rounds: int) -> float:
        several = len(passes(rival, self.device)) > 1  # forward alone, then forward and backward
        return rounds * self.predict(workload, rival) * (4 / 3 if several else 1)

    def cost(self, workload: Workload, rival: str) -> float:
        """Total seconds of a cell: start, compilation, the checked first pass, its share of the repeats."""
        if unavailable(workload, rival, self.device):
            return 0.0
        rounds = 1 + (ROUNDS[0] if (workload.height, workload.width) == FOCUS else 0)  # one is discarded
        compiling = COMPILE_SECONDS + self._repeats(workload, rival, 1) if uses_compiler(rival) else 0.0
        return START_SECONDS + compiling + self.predict(workload, rival) + self._repeats(workload, rival, rounds)

    def least(self, workload: Workload) -> float:
        """Least seconds of the required rivals: float64 reference, start, the checked pass, and repeats at FOCUS."""
        reference = self.reference_rate * flops(workload)[1]
        required = self.required(workload)
        if required == ["fused"]:
            return START_SECONDS + reference + self.predict(workload, "fused")
        return reference + sum(self.cost(workload, name) for name in required)

    def verdict(self, workload: Workload, rival: str, available: int, to_come: Sequence[Workload]) -> str | None:
        """None if the cell may run, else the reason, as the report prints it."""
        needed = needed_bytes(workload, rival, self.device)
        if needed > MEMORY_SHARE * available:
            return f"would not fit: needs {needed / GIB:.1f} GiB, {available / GIB:.1f} GiB available"
        required = self.required(workload)
        if self.budget is None or rival in required:
            return None
        left = self.spare(to_come)
        if len(required) > 1:  # their repeats are still to come
            left -= sum(self._repeats(workload, name, 1 + ROUNDS[0]) for name in required)
        seconds = self.cost(workload, rival)
        if seconds > max(left, CHEAP * self.budget):
            return f"over the time budget: about {seconds:.0f} s, {max(left, 0):.0f} s left"
        return None

    def spare(self, to_come: Sequence[Workload]) -> float:
        """Seconds left after what the required rivals need at later sizes."""
        if self.budget is None:
            return float("inf")
        return self.budget - self.elapsed - sum(self.least(later) for later in to_come)

    def left(self, cells: list[tuple[Workload, str]]) -> float:
        """Seconds that these cells will take, as far as the rates so far tell; skipped ones count until then."""
        seconds = sum(self.cost(*cell) for cell in cells)
        return seconds if self.budget is None else min(seconds, max(self.budget - self.elapsed, 0.0))

    def rounds(self, workload: Workload, round_seconds: float, to_come: list[Workload]) -> int:
        """The number of timed rounds of a workload after a discarded one; 0: the first pass is the figure."""
        if len(self.required(workload)) > 1:
            least = ROUNDS[0]
        elif round_seconds > SINGLE_SECONDS:
            return 0
        else:
            least = 0
        wanted = int(min(max(TIMED_SECONDS / max(round_seconds, 1e-9), ROUNDS[0]), ROUNDS[1]))
        seconds = float("inf") if self.budget is None else max(self.spare(to_come), CHEAP * self.budget)
        return max(least, int(min(wanted, seconds / max(round_seconds, 1e-9) - 1)))
