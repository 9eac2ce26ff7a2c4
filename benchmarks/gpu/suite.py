"""The command ``python -m benchmarks.gpu_suite``: ``--help``, ``--dry-run``, ``--plan``.

The libraries are built first, unless libraries of these sources are present. Everything that uses them runs in child
processes started afterwards, which stop unless the package's own kernels are loaded. Every result is written to one
JSON file at once, so that an interrupted run resumes; results of other sources or another kind of device are measured
again. Exit status: 0, all selected work is done (or there is no GPU); 1, something failed or was wrong; 2, the command
cannot run as given; 3, the time limit was reached and the same command continues.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from .. import command_line
from ..command_line import Refused
from ..workloads import DTYPES as ALL_DTYPES
from . import bench, build, ceilings, plan, profile, sanitize, smoke, tests
from .report import write_table
from .selection import DTYPES, FAMILIES, RIVALS, SIZES, Selection
from .state import Clock, State, combined

PROG = "python -m benchmarks.gpu_suite"
# In the order in which they run; each has steps() and run().
PIECES = {
    "build": build,
    "smoke": smoke,
    "ceilings": ceilings,
    "bench": bench,
    "tests": tests,
    "profile": profile,
    "sanitize": sanitize,
}
ON_HOST = ("build", "smoke", "ceilings", "bench")  # these also run on a CPU
MORE_TO_DO = 3


def default_output() -> Path:
    """In ``$OUT``, the folder that a lent machine returns, or in report/gpu."""
    return Path(os.environ["OUT"] if os.environ.get("OUT") else "report/gpu") / "gpu.json"


def describe(state: State, selection: Selection, pieces: list[str]) -> list[str]:
    """The lines of ``--dry-run``: each piece's steps and which are done."""
    lines = []
    for piece in pieces:
        if piece == "bench":
            planned = [(work, name) for work in selection.workloads() for name in selection.rivals_of(work)]
            done = sum(state.cell(*cell) is not None for cell in planned)
            lines.append(f"bench: {len(planned)} cells, {done} done")
        else:
            found = [f"{name} {entry['status']}" for name, entry in state.pieces.get(piece, {}).items()]
            lines.append(f"{piece}: {', '.join(found) or 'nothing done'}")
        lines += [f"  {step}" for step in PIECES[piece].steps(selection)]
    return lines


def _batches(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(command_line.whole()(part) for part in text.split(",")))


def _text(names) -> str:
    return ",".join(names)


def parser() -> argparse.ArgumentParser:
    p = command_line.Parser(
        prog=PROG,
        description="Builds for the GPU at hand, checks, benchmarks, tests, profiles and sanitizes; resumable.",
    )
    p.add_argument(
        "--piece",
        choices=tuple(PIECES),
        action="append",
        help="repeatable; all of them if not given. They run in this order: " + ", ".join(PIECES),
    )
    p.add_argument(
        "--families", type=command_line.names(tuple(FAMILIES)), default=tuple(FAMILIES), help=_text(FAMILIES)
    )
    p.add_argument("--rivals", type=command_line.names(RIVALS), default=RIVALS, help=f"of bench: {_text(RIVALS)}")
    sizes = _text(f"{height}x{width}" for height, width in SIZES)
    p.add_argument("--sizes", type=command_line.sizes, default=SIZES, help=f"of bench, comma-separated HxW: {sizes}")
    p.add_argument(
        "--dtypes", type=command_line.names(tuple(ALL_DTYPES)), default=DTYPES, help=f"of bench: {_text(DTYPES)}"
    )
    p.add_argument("--batches", type=_batches, help="of bench: 8,1 and for criss-cross also 32")
    p.add_argument("--output", type=Path, default=None, help="state and result, one JSON: $OUT or report/gpu, gpu.json")
    p.add_argument("--resume", type=Path, help="a JSON of an earlier run to continue, if --output does not exist")
    p.add_argument(
        "--limit",
        type=command_line.seconds,
        default=460.0,
        help="seconds of this invocation; the next one continues (460)",
    )
    p.add_argument(
        "--device", type=command_line.device, default="cuda", help=f"cuda or cuda:N; cpu rehearses {_text(ON_HOST)}"
    )
    p.add_argument("--again", action="store_true", help="ignore existing results")
    p.add_argument("--dry-run", action="store_true", help="list the work and which of it is done; needs no GPU")
    p.add_argument("--plan", action="store_true", help="print the calls that fill half an hour on a lent machine")
    return p


def _state(output: Path, arguments: argparse.Namespace) -> State:
    """The results so far. Raises Refused if a file is not the suite's."""
    if arguments.resume and not arguments.resume.is_file():
        raise Refused(f"--resume {arguments.resume}: no such file")
    if arguments.resume and output.exists():
        print(f"gpu_suite: {output} exists and is continued; --resume {arguments.resume} is not read")
    try:
        return State(output, arguments.again, arguments.resume)
    except ValueError as error:
        raise Refused(error) from error


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parser()
    arguments = options.parse_args(argv)
    if arguments.plan:
        print("\n".join(plan.describe()))
        return 0
    possible = list(PIECES) if arguments.device.type == "cuda" else list(ON_HOST)
    chosen = arguments.piece or possible
    if impossible := [piece for piece in chosen if piece not in possible]:
        options.error(f"--device {arguments.device} rehearses {', '.join(ON_HOST)} (got --piece {impossible[0]})")
    chosen = [piece for piece in PIECES if piece in chosen]
    return command_line.run(PROG, lambda: _run(argv, arguments, chosen))


def _run(argv: list[str], arguments: argparse.Namespace, chosen: list[str]) -> int:
    selection = Selection(arguments.families, arguments.sizes, arguments.dtypes, arguments.batches, arguments.rivals)
    output = arguments.output or default_output()
    if arguments.dry_run:
        print("\n".join(describe(_state(output, arguments), selection, chosen)))
        return 0
    device = str(arguments.device)
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: torch sees no CUDA device here, so there is nothing to run (--dry-run lists the work).")
        return 0
    command_line.visible(arguments.device)
    command_line.writable_folder(output.parent)
    clock = Clock(arguments.limit)
    state = _state(output, arguments)
    state.commands.append(" ".join([PROG, *argv]))
    state.save()
    verdicts = [] if "build" in chosen else [build.check(state, clock, device)]
    for piece in chosen:
        if piece != "build" and verdicts[0] is not True:
            break  # the libraries are not those of this tree
        verdicts.append(PIECES[piece].run(state, clock, selection, device))
    print(f"gpu_suite: {write_table(state)}")
    verdict = combined(verdicts)
    return 1 if verdict is False else MORE_TO_DO if verdict is None else 0
