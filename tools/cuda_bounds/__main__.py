"""Bounds of the CUDA kernels on five GPUs, and the instructions of their loops, from machine code.

    python -m tools.cuda_bounds                     # writes docs/cuda_bounds.md, minutes for each size
    python -m tools.cuda_bounds --file X.cubin      # a table of the loops of every tensor-core kernel
    python -m tools.cuda_bounds --file X.cubin --operator position --size 97 97 --architecture 90
                                                    # what a turn of the loops executes in a launch of that size

Needs cuobjdump (the toolkit's or triton's) but no GPU; the first also nvcc and the emulator (tests/emulator). It writes
the document after each size, keeps what it has walked in build/ and continues from there, while the machine code is the
same.
"""

import argparse
import hashlib
import pickle
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

from ..compilers import ROOT, cuobjdump, nvcc
from ..compilers import files as whole_files
from ..cuda_resources import fat_binaries, sources
from . import document, launches, sass

RESULTS = ROOT / "build" / "cuda_bounds.pkl"


def write_document(emulator: ModuleType) -> None:
    files = fat_binaries(sources(), document.ARCHITECTURES)
    mark = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    done: document.Done = {}
    if RESULTS.exists():
        before, known = pickle.loads(RESULTS.read_bytes())
        done = known if before == mark else {}
    for problem in document.PROBLEMS:
        if (problem, document.ARCHITECTURES[-1]) not in done:
            done |= document.measure(emulator, files, (problem,))
            with whole_files.replacing(RESULTS) as part:
                part.write_bytes(pickle.dumps((mark, done)))
        whole_files.write_text(document.DOCUMENT, document.document(done))


def loop_rows(function: sass.Function) -> list[str]:
    """A line for each loop with tensor-core instructions in it or below it, and for the loops inside those.

    The figures are of the loop's own blocks, without the loops inside it. "always" counts the blocks that every turn
    executes; the others are behind branches.
    """
    rows = []
    for loop in function.loops:
        around, relevant = loop, False
        while around is not None and not relevant:
            relevant = function.count(around.blocks)["tensor"] > 0
            around = around.parent
        if not relevant:
            continue
        every, always = function.count(loop.own), function.count(loop.own & loop.always)
        total, mma = sum(every.values()), every["tensor"]
        end = max(function.blocks[a].instructions[-1].address for a in loop.blocks)
        figures = [
            f"{'  ' * loop.depth}{loop.header:#07x}-{end:#07x}".ljust(24),
            f"{total:6d} {sum(always.values()):6d}",
        ]
        figures.append(f"{total / mma:6.1f}" if mma else "     -")
        figures += [f"{every[unit]:{max(len(unit), 4)}d}" for unit in sass.UNITS]
        rows.append(" ".join(figures))
    return rows


def print_executed(emulator: ModuleType, options: argparse.Namespace) -> None:
    """What the thread block in the middle of each launch executes a turn of its loops, without the loops inside."""
    problem = launches.Problem(options.operator, *options.size, options.batch)
    found = launches.record(emulator, problem, options.architecture)
    walkers = launches.Walkers([options.file])
    for launch in found:
        if re.search(options.kernel, launch.kernel) is None:
            continue
        walker = walkers.of(options.architecture, launch.kernel)
        walk = walker.walk(launch.arguments, launch.grid, launch.threads, [launch.grid // 2])
        print(f"\n{launch.kernel}, {launch.grid} thread blocks")
        print("  " + "loop".ljust(16), "   turns    all  a mma", *(unit.rjust(4) for unit in sass.UNITS))
        for loop in walker.function.loops:
            turns, count = walk.executions[loop.header], Counter[str]()
            if turns == 0:
                continue
            for address in loop.own:
                for unit, number in walker.function.count(frozenset((address,))).items():
                    count[unit] += number * walk.executions[address]
            total, mma = sum(count.values()), count["tensor"]
            row = (
                f"{'  ' * loop.depth}{loop.header:#07x}".ljust(16) + f" {turns / walk.warps:8.1f} {total / turns:6.1f}"
            )
            row += f" {total / mma:6.1f}" if mma else "      -"
            print("  " + row, *(f"{count[unit] / turns:{max(len(unit), 4)}.0f}" for unit in sass.UNITS))


def print_loops(functions: list[sass.Function], matching: str) -> None:
    for function in functions:
        whole = function.count(frozenset(function.blocks))
        if whole["tensor"] == 0 or re.search(matching, function.name) is None:
            continue
        shapes = Counter(i.opcode for b in function.blocks.values() for i in b.instructions if i.unit == "tensor")
        print(f"\nsm_{function.architecture} {function.name}")
        print(f"  {sum(whole.values())} instructions, {dict(shapes)}")
        print("  " + "loop".ljust(24), "   all always  a mma", *(unit.rjust(4) for unit in sass.UNITS))
        for row in loop_rows(function):
            print("  " + row)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.cuda_bounds", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, help="a cubin, fat binary or shared library")
    parser.add_argument("--architecture", type=int, help="90 for sm_90; all in the file if absent")
    parser.add_argument("--kernel", default="", help="a regular expression that the kernels' names contain")
    parser.add_argument("--operator", choices=launches.OPERATORS, help="print what a turn of the loops executes")
    parser.add_argument("--size", type=int, nargs=2, default=(97, 97), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    if options.operator and not (options.file and options.architecture):
        parser.error("--operator needs --file and --architecture")
    for tool in (cuobjdump,) if options.file else (cuobjdump, nvcc):
        if tool() is None:
            reason = f"no {tool.__name__} on PATH or where CUDA is usually installed"
            print(f"python -m tools.cuda_bounds: {reason}", file=sys.stderr)
            return 2
    if options.file and not options.operator:
        print_loops(sass.read(options.file, options.architecture), options.kernel)
        return 0
    from tests.emulator import build  # here: the emulator's tests import the tools

    emulator = build.load("plain")
    if options.operator:
        print_executed(emulator, options)
        return 0
    write_document(emulator)
    return 0


if __name__ == "__main__":
    sys.exit(main())
