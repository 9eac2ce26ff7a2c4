"""What the subcommands share: arguments that are checked in words, and one line on stderr with exit status 2 for what
cannot run."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import torch

from .._files import bounded, shown

PROG = "python -m segattn_ops"
INTERRUPTED = 130
WIDTH = 80
_MOST = 10**9  # of a count on the command line


class Refused(Exception):
    """Why a command cannot run, in one sentence."""


class Parser(argparse.ArgumentParser):
    """Errors are one line; the usage is what --help prints."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_line(message)} (--help lists the options)\n")


def _line(reason: object) -> str:
    return bounded(" ".join(str(reason).split()))


def guarded(prog: str, command: Callable[[], int]) -> int:
    """The exit status of ``command``: 2 and a line on stderr for :class:`Refused`, for values that the package refuses,
    for files that cannot be read or written, and for too little memory; 130 after an interrupt."""
    try:
        return command()
    except (Refused, OSError, ValueError, TypeError, ImportError) as error:
        return _fail(prog, error, 2)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # that of torch's allocators
            raise
        return _fail(prog, f"there is not enough memory: {error}", 2)
    except KeyboardInterrupt:
        return _fail(prog, "interrupted", INTERRUPTED)


def _fail(prog: str, reason: object, status: int) -> int:
    command = prog.split()[-1]
    print(f"{prog}: {_line(reason).removeprefix(f'{command}: ')}", file=sys.stderr)
    return status


def whole(least: int = 1, most: int = _MOST) -> Callable[[str], int]:
    """A parser of whole numbers in a range."""

    def parse(text: str) -> int:
        digits = text.removeprefix("-")
        value = int(text) if digits.isascii() and digits.isdecimal() and len(digits) <= 20 else None
        if value is None or not least <= value <= most:
            bounds = f"of at least {least}" if most == _MOST else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number {bounds} (got {shown(text, 80)!r})")
        return value

    return parse


def require(*modules: str) -> None:
    """Raises :class:`Refused` for packages that are not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join({"PIL": "pillow"}.get(name, name) for name in missing)
        raise Refused(f"needs {', '.join(missing)}: pip install {packages}")


def device(text: str) -> torch.device:
    """cpu, cuda or cuda:N, if torch sees it."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda") or (found.type == "cpu" and found.index is not None):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N (got {shown(text, 80)!r})")
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise argparse.ArgumentTypeError(f"torch sees {count} CUDA devices (got {text!r})")
    return found


def input_file(path: str) -> Path:
    """Raises :class:`Refused` unless there is such a file."""
    found = Path(path)
    if not found.exists():
        raise Refused(f"there is no file {shown(path)}")
    if found.is_dir():
        raise Refused(f"{shown(path)} is a folder, not a file")
    return found


def output_file(path: str, force: bool) -> Path:
    """Raises :class:`Refused` if the file cannot be written, or exists and is not to be overwritten."""
    found = Path(path)
    if found.is_dir():
        raise Refused(f"{shown(path)} is a folder: name a file in it")
    if found.exists() and not force:
        raise Refused(f"{shown(path)} exists: --force overwrites it")
    if not found.parent.is_dir():
        raise Refused(f"there is no folder {shown(found.parent)} for {shown(found.name)}")
    if not os.access(found.parent, os.W_OK | os.X_OK):
        raise Refused(f"the folder {shown(found.parent)} is not writable")
    return found


def lines(entries: Iterable[tuple[str, str]]) -> str:
    """Names and texts in two columns, wrapped at the width of a terminal."""
    found = list(entries)
    indent = max(len(name) for name, _ in found) + 2
    return "\n".join(
        textwrap.fill(
            f"{name:<{indent}}{text}",
            WIDTH,
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
            break_long_words=False,
        )
        for name, text in found
    )


def listed(names: Iterable[str], most: int = 6) -> str:
    """The first names, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(shown(name) for name in found[:most]) + more
