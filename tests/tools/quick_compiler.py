"""A compiler for tests of a build whose libraries need not be fast."""

from pathlib import Path

from tools.compilers import compiler


def without_optimisation(folder: Path) -> str:
    """A program in a new folder that is the C++ compiler with -O0 after all flags, for the environment's CXX."""
    program = folder / "unoptimised" / "g++"  # torch warns of other names
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {compiler()} "$@" -O0\n')
    program.chmod(0o755)
    return str(program)
