"""Bounds of the CUDA kernels on five GPUs, and the instructions of their loops, from machine code.

    python -m tools.cuda_bounds                     # writes docs/cuda_bounds.md
    python -m tools.cuda_bounds --file X.cubin      # a table of the loops of every tensor-core kernel

Needs cuobjdump (the toolkit's or triton's) but no GPU; the first also nvcc and the emulator (tests/emulator).
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

from ..compilers import cuobjdump, nvcc
from . import document, sass


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
    options = parser.parse_args()
    for tool in (cuobjdump,) if options.file else (cuobjdump, nvcc):
        if tool() is None:
            reason = f"no {tool.__name__} on PATH or where CUDA is usually installed"
            print(f"python -m tools.cuda_bounds: {reason}", file=sys.stderr)
            return 2
    if options.file:
        print_loops(sass.read(options.file, options.architecture), options.kernel)
        return 0
    from tests.emulator import build  # here: the emulator's tests import the tools

    document.DOCUMENT.write_text(document.document(document.measure(build.load("plain"))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
