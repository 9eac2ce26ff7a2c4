"""Shared by the pieces that run commands: resumable steps, the driver's command line, bounded logs."""

from __future__ import annotations

import math
import sys
from pathlib import Path

from . import children
from .state import Clock, State, combined

LEAST_SECONDS = 20.0  # with less time left, no step starts
FILE_BYTES = 4 << 20  # longest log file


def run_steps(
    state: State,
    piece: str,
    commands: dict[str, list[str]],
    clock: Clock,
    environment: dict | None = None,
    together: int = 1,
    seconds: float = math.inf,
) -> bool | None:
    """Runs the named commands that have not passed yet, ``together`` of them at a time. One that takes longer than
    ``seconds`` has failed: a kernel that hangs must leave time for the pieces that follow."""
    todo = [name for name in commands if not state.step(piece, name)]
    verdicts: list[bool | None] = []
    while todo:
        if clock.left < LEAST_SECONDS:
            return combined([*verdicts, None])
        names, todo = todo[:together], todo[together:]
        print(f"{piece}: {', '.join(names)}", flush=True)
        limit = min(seconds, clock.left - children.GRACE)
        results = children.run([commands[name] for name in names], limit, environment)
        for name, result in zip(names, results, strict=True):
            lines = result.output.strip().splitlines()
            too_long = result.passed is None and limit == seconds
            verdict = "failed" if too_long else result.verdict
            if too_long:
                lines.append(f"stopped after {seconds:.0f} s")
            facts = {"seconds": round(result.seconds, 1), "command": commands[name], "exit_status": result.status}
            state.set_step(piece, name, verdict, **facts, output=lines)
            shown = lines[-1:] if verdict == "passed" else lines[-8:]
            print(
                f"  {name} {verdict} in {result.seconds:.0f} s: " + "\n    ".join(line[:300] for line in shown),
                flush=True,
            )
            verdicts.append(False if too_long else result.passed)
    return combined(verdicts)


def driver_command(family: str, device: str, *options: str) -> list[str]:
    """The command of ``benchmarks.gpu.driver`` for an op family."""
    return [sys.executable, "-m", "benchmarks.gpu.driver", "--op", family, "--device", device, *options]


def missing_program(state: State, piece: str, program: str) -> bool:
    """Records that a piece failed because a program is not installed."""
    line = f"{program} is not on PATH or in the usual places"
    print(f"{piece}: {line}", flush=True)
    state.set_step(piece, program, "failed", output=[line])
    return False


def shorten(path: Path, limit: int = FILE_BYTES) -> None:
    """Cuts the middle out of a file that is longer than the limit, so that it can be returned from a lent machine."""
    content = path.read_bytes()
    if len(content) > limit:
        left_out = f"\n[{len(content) - limit} bytes left out here]\n".encode()
        path.write_bytes(content[: limit // 2] + left_out + content[-(limit // 2) :])
