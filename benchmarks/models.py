"""``python -m benchmarks models``: DANet, CCNet, ANN and Non-local networks end to end."""

from __future__ import annotations

import sys

from . import subject_command

SUMMARY = "DANet, CCNet, ANN and Non-local networks end to end: images a second and peak memory, eager and converted"
COMMAND = subject_command.Command(
    kind="model",
    prog="python -m benchmarks models",
    summary=SUMMARY,
    sizes="512x1024,1024x2048",
    size_help="image sizes HxW in pixels, comma-separated",
    budget=1800.0,
)


def main(argv: list[str]) -> int:
    return subject_command.main(COMMAND, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
