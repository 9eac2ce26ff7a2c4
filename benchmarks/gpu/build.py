"""The piece ``build``: builds the libraries unless those present match the sources and run."""

from __future__ import annotations

import os
import sys

from . import children
from .client import Refused, Worker, WorkerLost
from .selection import Selection
from .state import Clock, State
from .steps import LEAST_SECONDS


def steps(selection: Selection) -> list[str]:
    return ["libraries"]


def identify(state: State, clock: Clock, device: str) -> dict:
    """The machine's facts and the libraries' fault, if any, from a process that ends before the libraries are rebuilt.

    Never cached: the state file may come from another machine, and the libraries may have changed.
    """
    with Worker(device) as worker:
        try:
            facts = worker.ask("identify", min(max(clock.left, 1), 100))
        except (Refused, WorkerLost) as error:
            return {"fault": str(error), "capability": None}
    state.machine = facts["machine"]
    state.save()
    return facts


def run(state: State, clock: Clock, selection: Selection, device: str) -> bool | None:
    """Builds the libraries unless those present, built here or carried, match the sources and run on the device."""
    if clock.left < LEAST_SECONDS:  # a check cut short would look like a fault
        return None
    facts = identify(state, clock, device)
    if facts["fault"] is None:
        built = facts["build"]
        print(f"build: the libraries here are of these sources and run (built with torch {built['torch_at_build']})")
        state.set_step("build", "libraries", "passed", built_here=False, build=built)
        return True
    print(f"build: {facts['fault']}; building", flush=True)
    environment = {"MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 2))}
    if capability := facts["capability"]:
        architecture = os.environ.get("TORCH_CUDA_ARCH_LIST", ".".join(map(str, capability)))
        # One CPU instruction set: the suite measures and tests on the GPU.
        only = os.environ.get("SEGATTN_CPU_ONLY", "baseline")
        environment |= {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architecture, "SEGATTN_CPU_ONLY": only}
    if clock.left < LEAST_SECONDS:
        return None
    # --force: carried libraries of other sources may have later dates than the sources here.
    command = [sys.executable, "setup.py", "build_ext", "--inplace", "--force"]
    (result,) = children.run([command], clock.left - children.GRACE, environment)
    lines = result.output.strip().splitlines()
    verdict, passed = result.verdict, result.passed
    if passed:
        facts = identify(state, clock, device)
        if facts["fault"] is not None:
            verdict, passed, lines = "failed", False, [*lines, facts["fault"]]
    step = {"seconds": round(result.seconds, 1), "command": command, "exit_status": result.status}
    state.set_step("build", "libraries", verdict, built_here=True, **step, output=lines)
    print(f"build: {verdict} in {result.seconds:.0f} s: {lines[-1][:300] if lines else ''}", flush=True)
    return passed


def check(state: State, clock: Clock, device: str) -> bool:
    """Runs in place of the build where it is not selected: no other piece may run without matching libraries."""
    fault = identify(state, clock, device)["fault"]
    if fault:
        print(f"gpu_suite: {fault}; run the piece build first")
    return fault is None
