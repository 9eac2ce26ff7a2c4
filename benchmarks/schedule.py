"""Decides which cells run, and how often, within a time budget and the available memory.

Sizes go from small to large, so that a cell's rate at one size predicts its time at the next. A rival runs if its
attention maps fit in memory and the fused op still has time at every later size. The report names each skipped cell and
the reason.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from .rivals import needed_bytes, uses_compiler
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


@dataclass
class Schedule:
    """Clock, rates and decisions of one run. ``budget`` is in seconds from creation; None for no limit."""

    budget: float | None
    device: str = "cpu"
    reference_rate: float = 0.0  # seconds of the latest float64 reference per FLOP of its workload
    rates: dict[tuple[str, str, str], float] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def predict(self, workload: Workload, rival: str) -> float:
        """Seconds of one forward + backward."""
        rate = self.rates.get((workload.op, rival, workload.dtype)) or self.rates.get(
            (workload.op, "eager", workload.dtype), GUESS
        )
        return flops(workload)[1] / rate

    def learn(self, workload: Workload, rival: str, seconds: float) -> None:
        """Stores the rate of a measured forward + backward, for later sizes."""
        self.rates[workload.op, rival, workload.dtype] = flops(workload)[1] / seconds

    def cost(self, workload: Workload, rival: str) -> float:
        """Total seconds of a cell: start, compilation, the checked first pass, its share of the repeats."""
        once = self.predict(workload, rival)
        round_seconds = once * 4 / 3  # forward alone, then forward and backward
        setup = START_SECONDS + (COMPILE_SECONDS + round_seconds if uses_compiler(rival) else 0.0)
        return setup + once + round_seconds

    def least(self, workload: Workload) -> float:
        """Least seconds of the fused op: float64 reference, start, and one checked pass."""
        return START_SECONDS + self.reference_rate * flops(workload)[1] + self.predict(workload, "fused")

    def verdict(self, workload: Workload, rival: str, available: int, to_come: list[Workload]) -> str | None:
        """None if the cell may run, else the reason, as the report prints it."""
        needed = needed_bytes(workload, rival, self.device)
        if needed > MEMORY_SHARE * available:
            return f"would not fit: needs {needed / GIB:.1f} GiB, {available / GIB:.1f} GiB available"
        if self.budget is None or rival == "fused":
            return None
        left = self.spare(to_come)
        seconds = self.cost(workload, rival)
        if seconds > max(left, CHEAP * self.budget):
            return f"over the time budget: about {seconds:.0f} s, {max(left, 0):.0f} s left"
        return None

    def spare(self, to_come: list[Workload]) -> float:
        """Seconds left after what the fused op needs at later sizes."""
        if self.budget is None:
            return float("inf")
        return self.budget - self.elapsed - sum(self.least(later) for later in to_come)

    def rounds(self, round_seconds: float, to_come: list[Workload]) -> int:
        """The number of timed rounds of a workload after a discarded one; 0: the first pass is the figure."""
        if round_seconds > SINGLE_SECONDS:
            return 0
        wanted = int(min(max(TIMED_SECONDS / max(round_seconds, 1e-9), ROUNDS[0]), ROUNDS[1]))
        seconds = float("inf") if self.budget is None else max(self.spare(to_come), CHEAP * self.budget)
        return max(0, int(min(wanted, seconds / max(round_seconds, 1e-9) - 1)))
