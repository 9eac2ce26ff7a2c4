"""``python -m benchmarks modules``: the papers' blocks with their convolutions."""

from __future__ import annotations

import sys

from . import subject_command

SUMMARY = "the papers' blocks with their convolutions: time, extra memory and FLOP, fused, eager and with SDPA"
COMMAND = subject_command.Command(
    kind="module",
    prog="python -m benchmarks modules",
    summary=SUMMARY,
    sizes="97x97,128x256",
    size_help="feature-map sizes HxW, comma-separated; 97x97 is that of CCNet's table",
    budget=1200.0,
)


def main(argv: list[str]) -> int:
    return subject_command.main(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
