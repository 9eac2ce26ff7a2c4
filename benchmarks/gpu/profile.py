"""The piece ``profile``: Nsight Compute's full report of the kernels of each family at 97 x 97."""

from __future__ import annotations

from tools.compilers import build_tools

from .selection import Selection
from .state import Clock, State
from .steps import driver_command, missing_program, run_steps, shorten

SHAPE = ("--size", "97x97", "--batch", "8", "--channels", "512", "--key-channels", "64")


def steps(selection: Selection) -> list[str]:
    return list(selection.families)


def run(state: State, clock: Clock, selection: Selection, device: str) -> bool | None:
    """Writes profile-FAMILY.txt beside the state. One family at a time, since profilers share the device's counters;
    the clocks stay unlocked, as in the benchmarks."""
    program = build_tools.find_program("ncu")
    if not program:
        return missing_program(state, "profile", "ncu")
    commands, logs = {}, []
    for family in selection.families:
        logs.append((state.path.parent / f"profile-{family}.txt").resolve())
        command = [program, "--clock-control", "none", "--set", "full", "--kernel-name-base", "mangled"]
        command += ["--kernel-name", "regex:segattn", "--log-file", str(logs[-1])]
        commands[family] = command + driver_command(family, device, "--dtypes", "bfloat16", "--once", *SHAPE)
    verdict = run_steps(state, "profile", commands, clock)
    for log in logs:
        if log.exists():
            shorten(log)
    return verdict
