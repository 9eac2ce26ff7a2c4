"""``python -m benchmarks SUBCOMMAND``. Without a subcommand, or with options only, it is ``ops``, the main job."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from . import command_line

PROG = "python -m benchmarks"
MAIN_JOB = "ops"
# The modules of this package, each with SUMMARY, a line for --help, and main(arguments), which returns the exit status.
SUBCOMMANDS = {
    "ops": "ops",
    "modules": "modules",
    "models": "models",
    "scaling": "scaling",
    "papers": "papers",
    "compare": "compare",
    "report": "page",
}


def module(subcommand: str) -> ModuleType:
    return importlib.import_module(f".{SUBCOMMANDS[subcommand]}", __package__)


def usage() -> str:
    width = max(map(len, SUBCOMMANDS))
    lines = [f"  {name:<{width}}  {module(name).SUMMARY}" for name in SUBCOMMANDS]
    return "\n".join(
        (
            f"usage: {PROG} [SUBCOMMAND] [options]",
            "",
            *lines,
            "",
            f"Without a subcommand it is {MAIN_JOB}. {PROG} SUBCOMMAND --help lists the options of each.",
        )
    )


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if not argv or argv[0].startswith("-"):
        return module(MAIN_JOB).main(argv)
    if argv[0] not in SUBCOMMANDS:
        reason = f"the subcommand must be one of {', '.join(SUBCOMMANDS)} (got {argv[0]!r}; --help describes them)"
        return command_line.fail(PROG, reason, 2)
    return module(argv[0]).main(argv[1:])


if __name__ == "__main__":
    sys.exit(main())
