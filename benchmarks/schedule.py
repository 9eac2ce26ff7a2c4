"""Decides what runs, and how often, inside a time budget and the memory there is.

Sizes go from small to large, so that every cell's time is predicted from its own rate at the size before. A rival runs
if its maps fit in memory and if, after it, time is left for the fused op at every size still to come; a cell that does
not run says why, in the report, instead of crashing or being forgotten.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from .rivals import needed_bytes, uses_compiler
from .workloads import Workload, flops

GIB = 2**30
MEMORY_SHARE = 0.9  # of what is available, what a cell may need
START_SECONDS = 0.4  # forking, loading operands, warming up
COMPILE_SECONDS = 6.0  # torch.compile of one cell, forward and backward
CHEAP = 0.015  # of the budget: what takes less runs anyway, while the rates are still guesses
GUESS = 60e9  # FLOP/s of a cell whose rate nobody has seen yet
TIMED_SECONDS = 5.0  # what the repeats of one workload may take, if three rounds allow
ROUNDS = (3, 9)
SINGLE_SECONDS = 18.0  # a round longer than this is not repeated


@dataclass
class Schedule:
    """Clock, rates and verdicts of one run. ``budget`` is in seconds, counted from creation; None for no limit."""

    budget: float | None
    device: str = "cpu"
    reference_rate: float = 0.0  # seconds of the float64 reference per FLOP of a workload, the last one seen
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
        """Takes the rate of a measured forward + backward for the sizes to come."""
        self.rates[workload.op, rival, workload.dtype] = flops(workload)[1] / seconds

    def cost(self, workload: Workload, rival: str) -> float:
        """Seconds a cell takes in all: start, compilation, the checked first pass, its share of the repeats."""
        once = self.predict(workload, rival)
        round_seconds = once * 4 / 3  # forward alone, then forward and backward
        setup = START_SECONDS + (COMPILE_SECONDS + round_seconds if uses_compiler(rival) else 0.0)
        return setup + once + round_seconds

    def least(self, workload: Workload) -> float:
        """Seconds that the fused op needs at least: its float64 reference, start, and one checked pass."""
        return START_SECONDS + self.reference_rate * flops(workload)[1] + self.predict(workload, "fused")

    def verdict(self, workload: Workload, rival: str, available: int, to_come: list[Workload]) -> str | None:
        """None if the cell may run, or the reason why it does not, as the report prints it."""
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
        """Seconds left for anything but the fused op at the sizes to come."""
        if self.budget is None:
            return float("inf")
        return self.budget - self.elapsed - sum(self.least(later) for later in to_come)

    def rounds(self, round_seconds: float, to_come: list[Workload]) -> int:
        """How often a workload's cells are timed, all once a round, after a round that does not count; 0: not repeated,
        the first pass is the figure."""
        if round_seconds > SINGLE_SECONDS:
            return 0
        wanted = int(min(max(TIMED_SECONDS / max(round_seconds, 1e-9), ROUNDS[0]), ROUNDS[1]))
        seconds = float("inf") if self.budget is None else max(self.spare(to_come), CHEAP * self.budget)
        return max(0, int(min(wanted, seconds / max(round_seconds, 1e-9) - 1)))
