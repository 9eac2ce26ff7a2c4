"""Everything to run on a machine with a GPU, in pieces that resume: ``--help``, ``--dry-run``, ``--plan``.

The libraries come first: built here, or carried from elsewhere if they are of these sources. What uses them runs in
processes of its own, started afterwards, and stops unless the package's kernels are what runs. Every result is in one
JSON file as soon as it is there, so that an interrupted run goes on where it stopped; what was found with other
sources, or on another kind of device, is done again. Exit status: 0 all that was asked is done (or there is no GPU), 1
something failed or was wrong, 3 the time limit was reached and the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch

from . import gpu_pieces, gpu_plan
from .gpu_bench import bench
from .gpu_state import Clock, State, whole
from .gpu_table import write_table
from .gpu_work import DTYPES, FAMILIES, RIVALS, SIZES, Selection
from .workloads import DTYPES as ALL_DTYPES
from .workloads import parse_size

PIECES = {
    "smoke": gpu_pieces.smoke,
    "ceilings": gpu_pieces.ceilings,
    "bench": bench,
    "tests": gpu_pieces.tests,
    "profile": gpu_pieces.profile,
    "sanitize": gpu_pieces.sanitize,
}
REHEARSED = ("build", "smoke", "ceilings", "bench")  # what runs on the host as well
MORE_TO_DO = 3


def default_output() -> Path:
    """Into the folder that comes back from a lent machine, where there is one."""
    return Path(os.environ["OUT"] if os.environ.get("OUT") else "report/gpu") / "gpu.json"


def describe(state: State, selection: Selection, pieces: list[str]) -> list[str]:
    """What ``--dry-run`` prints: each piece's steps, and which are done."""
    lines = []
    for piece in pieces:
        if piece == "bench":
            planned = [(work, name) for work in selection.workloads() for name in selection.rivals_of(work)]
            done = sum(state.cell(*cell) is not None for cell in planned)
            lines.append(f"bench: {len(planned)} cells, {done} done")
            lines += [f"  {work.label}: {', '.join(selection.rivals_of(work))}" for work in selection.workloads()]
            continue
        found = [f"{name} {entry['status']}" for name, entry in state.pieces.get(piece, {}).items()]
        lines.append(f"{piece}: {', '.join(found) or 'nothing done'}")
        if piece in ("smoke", "profile"):
            lines += [f"  {family}" for family in selection.families]
        if piece == "sanitize":
            lines += [f"  {family} {tool}" for tool in gpu_pieces.SANITIZERS for family in selection.families]
    return lines


def _names(known: tuple[str, ...]):
    """A parser of comma-separated names."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"must be from {', '.join(known)} (got {unknown[0]!r})")
        return names

    return parse


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    try:
        return tuple(parse_size(size) for size in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _batches(text: str) -> tuple[int, ...]:
    if not all(part.isdigit() and int(part) > 0 for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"must be positive numbers with commas between them (got {text!r})")
    return tuple(int(part) for part in text.split(","))


def _text(names) -> str:
    return ",".join(names)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description="Builds for the GPU at hand, checks, benchmarks, tests, profiles and sanitizes; resumable.",
    )
    p.add_argument(
        "--piece",
        choices=("build", *PIECES),
        action="append",
        help="repeatable; all of them if not given. They run in this order: " + ", ".join(("build", *PIECES)),
    )
    p.add_argument("--families", type=_names(tuple(FAMILIES)), default=tuple(FAMILIES), help=_text(FAMILIES))
    p.add_argument("--rivals", type=_names(RIVALS), default=RIVALS, help=f"of bench: {_text(RIVALS)}")
    sizes = _text(f"{height}x{width}" for height, width in SIZES)
    p.add_argument("--sizes", type=_sizes, default=SIZES, help=f"of bench, HxW with commas between them: {sizes}")
    p.add_argument("--dtypes", type=_names(tuple(ALL_DTYPES)), default=DTYPES, help=f"of bench: {_text(DTYPES)}")
    p.add_argument("--batches", type=_batches, help="of bench: 8,1 and for criss-cross also 32")
    p.add_argument("--output", type=Path, default=None, help="state and result, one JSON: $OUT or report/gpu, gpu.json")
    p.add_argument(
        "--resume", type=Path, help="a JSON of an earlier run to go on from, where --output is not there yet"
    )
    p.add_argument("--limit", type=float, default=460.0, help="seconds of this invocation; the next one goes on (460)")
    p.add_argument("--device", default="cuda", help=f"cuda or cuda:N; cpu rehearses {_text(REHEARSED)}")
    p.add_argument("--again", action="store_true", help="forget what is done")
    p.add_argument("--dry-run", action="store_true", help="list the work and what of it is done; needs no GPU")
    p.add_argument("--plan", action="store_true", help="print the calls that fill half an hour on a lent machine")
    return p


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parser()
    arguments = options.parse_args(argv)
    if arguments.plan:
        print("\n".join(gpu_plan.describe()))
        return 0
    possible = ["build", *PIECES] if torch.device(arguments.device).type == "cuda" else list(REHEARSED)
    asked = arguments.piece or possible
    if impossible := [piece for piece in asked if piece not in possible]:
        options.error(f"--device {arguments.device} rehearses {', '.join(REHEARSED)} (got --piece {impossible[0]})")
    selection = Selection(arguments.families, arguments.sizes, arguments.dtypes, arguments.batches, arguments.rivals)
    output = arguments.output or default_output()
    if arguments.dry_run:
        state = State(output, arguments.again, arguments.resume)
        print("\n".join(describe(state, selection, [piece for piece in ("build", *PIECES) if piece in asked])))
        return 0
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu_suite: torch sees no CUDA device here, so there is nothing to run (--dry-run lists the work).")
        return 0
    clock = Clock(arguments.limit)
    state = State(output, arguments.again, arguments.resume)
    state.commands.append(" ".join(["python -m benchmarks.gpu_suite", *argv]))
    state.save()
    if "build" in asked:
        verdicts = [gpu_pieces.build(state, clock, arguments.device)]
    else:
        verdicts = [gpu_pieces.ready(state, clock, arguments.device)]
    if verdicts == [True]:  # otherwise nothing would be of this tree
        for piece, run in PIECES.items():
            if piece in asked:
                verdicts.append(run(state, clock, selection, arguments.device))
    print(f"gpu_suite: {write_table(state)}")
    verdict = whole(verdicts)
    return 1 if verdict is False else MORE_TO_DO if verdict is None else 0


if __name__ == "__main__":
    sys.exit(main())
