"""The command line, ``python -m segattn_ops``. A module a subcommand: ``SUMMARY``, a line of --help,
``add_arguments(parser)`` and ``run(arguments)``, which returns the exit status."""

from __future__ import annotations

import argparse

from . import convert_checkpoint, info, memory, self_test, visualize
from .command_line import PROG, Parser, guarded

COMMANDS = {
    "info": info,
    "self-test": self_test,
    "memory": memory,
    "convert-checkpoint": convert_checkpoint,
    "visualize": visualize,
}


def main(argv: list[str] | None = None) -> int:
    """The exit status: 1 if the self-test fails, 2 with a line on stderr for what cannot run."""
    parser = Parser(
        prog=PROG,
        description="Attention for segmentation networks without attention maps.\nWithout a command: info.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"{PROG} COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--json", action="store_true", help="of info: all facts as JSON")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=Parser)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.SUMMARY,
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
    arguments = parser.parse_args(argv)
    name = arguments.command or "info"
    return guarded(f"{PROG} {name}", lambda: COMMANDS[name].run(arguments))
