"""Runs a Python command with the CPU libraries built for a sanitizer, and fails if it reports anything:

    python -m tests.sanitizers address -m pytest tests/ops/test_ops.py

The first argument is address, undefined or thread. SEGATTN_CPU_CAPABILITY chooses the instruction set, without it the
best one of the processor.
"""

import os
import sys
import tempfile
from pathlib import Path

from . import build, process


def main() -> int:
    if len(sys.argv) < 3 or sys.argv[1] not in process.RUNTIMES:
        print(__doc__, file=sys.stderr)
        return 2
    variant, command = sys.argv[1], sys.argv[2:]
    instruction_set = build.wanted_instruction_set()
    package = build.build(variant, instruction_set, os.environ.get("SEGATTN_SANITIZER_FAMILY"))
    with tempfile.TemporaryDirectory() as folder:
        reports = Path(folder)
        return process.run(command, process.watching_environment(variant, package, reports, instruction_set), reports)


if __name__ == "__main__":
    sys.exit(main())
