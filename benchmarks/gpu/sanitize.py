"""The piece ``sanitize``: compute-sanitizer over the kernels of each family."""

from __future__ import annotations

from tools.compilers import build_tools

from . import children
from .selection import Selection
from .state import Clock, State
from .steps import driver_command, missing_program, run_steps

TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": [], "synccheck": []}


def steps(selection: Selection) -> list[str]:
    return [f"{family} {tool}" for tool in TOOLS for family in selection.families]


def run(state: State, clock: Clock, selection: Selection, device: str) -> bool | None:
    """Runs one process per family and tool, with all dtypes; the families of a tool run together."""
    program = build_tools.find_program("compute-sanitizer")
    if not program:
        return missing_program(state, "sanitize", "compute-sanitizer")
    # The option that restricts a tool to kernels by a part of their names differs between versions.
    (found,) = children.run([[program, "--help"]], 30)
    only_ours = next((name for name in ("--kernel-name", "--kernel-regex", "--filter") if name in found.output), None)
    commands = {}
    for tool, options in TOOLS.items():
        for family in selection.families:
            command = [program, "--tool", tool, "--error-exitcode", "9", *options]
            command += [only_ours, "kns=segattn"] if only_ours else []
            commands[f"{family} {tool}"] = command + driver_command(family, device)
    # PyTorch's allocator hands out parts of large blocks, inside which memcheck does not see an overrun.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return run_steps(state, "sanitize", commands, clock, environment, together=len(selection.families))
