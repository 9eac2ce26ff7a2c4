"""The piece ``ceilings``: the bandwidth of a copy and the throughput of matrix products that the device reaches."""

from __future__ import annotations

from .client import Refused, Worker, WorkerLost
from .selection import Selection
from .state import Clock, State
from .steps import LEAST_SECONDS


def steps(selection: Selection) -> list[str]:
    return ["device"]


def run(state: State, clock: Clock, selection: Selection, device: str) -> bool | None:
    """Measures the ceilings in a worker."""
    if state.step("ceilings", "device"):
        return True
    if clock.left < LEAST_SECONDS:
        return None
    with Worker(device) as worker:
        try:
            found = worker.ask("ceilings", clock.left)
        except (Refused, WorkerLost) as error:
            state.set_step("ceilings", "device", "failed", output=[str(error)])
            return False
    state.set_step("ceilings", "device", "passed", **found)
    for name, value in found.items():
        print(f"  {name}: {value / 1e12:.2f} T/s", flush=True)
    return True
