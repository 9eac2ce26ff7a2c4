"""The piece ``smoke``: each op forward and backward against float64 at one small size, the quickest check there is."""

from __future__ import annotations

from .selection import FAMILIES, Selection
from .state import Clock, State
from .steps import driver_command, run_steps

# Odd, more than one tile of every kernel, with the networks' channels.
SHAPE = ("--size", "33x35", "--batch", "2", "--channels", "512", "--key-channels", "64")
DTYPES = "bfloat16,float32"
SECONDS = 120.0  # limit of a family, most of it for starting torch


def steps(selection: Selection) -> list[str]:
    return list(selection.families)


def run(state: State, clock: Clock, selection: Selection, device: str) -> bool | None:
    """Runs the driver for all families at once."""
    commands = {family: driver_command(family, device, "--dtypes", DTYPES, *SHAPE) for family in selection.families}
    return run_steps(state, "smoke", commands, clock, together=len(FAMILIES), seconds=SECONDS)
