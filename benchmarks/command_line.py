"""What the commands share: arguments that are checked in words, and one line on stderr with exit status 2 for what
cannot run."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

from .workloads import parse_size

INTERRUPTED = 130
MOST = 10**9  # of a count on the command line
FLAGS = ("--resume", "--dry-run")  # options without a value


class Refused(Exception):
    """Why a command cannot run, in one sentence."""


class Parser(argparse.ArgumentParser):
    """Errors are one line; the usage is what --help prints."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def run(prog: str, command: Callable[[], int]) -> int:
    """The exit status of ``command``: 2 and a line on stderr for :class:`Refused`, for files that cannot be read or
    written, and for too little memory; 130 after an interrupt."""
    try:
        return command()
    except (Refused, OSError) as error:
        return fail(prog, error, 2)
    except MemoryError as error:
        return fail(prog, f"there is not enough memory: {error}", 2)
    except KeyboardInterrupt:
        return fail(prog, "interrupted", INTERRUPTED)


def example(prog: str, main: Callable[[], object]) -> int:
    """:func:`run` for a program that returns its results; a value that it finds wrong is refused too."""

    def command() -> int:
        try:
            main()
        except ValueError as error:
            raise Refused(error) from error
        return 0

    return run(prog, command)


def fail(prog: str, reason: object, status: int) -> int:
    print(f"{prog}: {' '.join(str(reason).split())}", file=sys.stderr)
    return status


def whole(least: int = 1, most: int = MOST) -> Callable[[str], int]:
    """A parser of whole numbers in a range."""

    def parse(text: str) -> int:
        digits = text.removeprefix("-")
        value = int(text) if digits.isdecimal() and len(digits) <= 20 else None
        if value is None or not least <= value <= most:
            bounds = f"of at least {least}" if most == MOST else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"must be a whole number {bounds} (got {text!r})")
        return value

    return parse


def _real(rule: str, holds: Callable[[float], bool]) -> Callable[[str], float]:
    """A parser of numbers for which ``holds`` is true; it is false for NaN."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not holds(value):
            raise argparse.ArgumentTypeError(f"must be {rule} (got {text!r})")
        return value

    return parse


seconds = _real("a number of seconds, at least 0", lambda value: 0 <= value < math.inf)
positive = _real("a positive number", lambda value: 0 < value < math.inf)


def names(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A parser of comma-separated names from ``known``, without repetitions."""

    def parse(text: str) -> tuple[str, ...]:
        chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        if not chosen or not set(chosen) <= set(known):
            raise argparse.ArgumentTypeError(f"must be from {', '.join(known)} (got {text!r})")
        return chosen

    return parse


def size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH."""
    try:
        return parse_size(text.strip())
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def sizes(text: str) -> tuple[tuple[int, int], ...]:
    """Comma-separated HEIGHTxWIDTH, without repetitions."""
    chosen = tuple(dict.fromkeys(size(part) for part in text.split(",") if part.strip()))
    if not chosen:
        raise argparse.ArgumentTypeError(f"at least one size HEIGHTxWIDTH is needed (got {text!r})")
    return chosen


def require(*modules: str) -> None:
    """Raises :class:`Refused` if a package of the extra ``bench`` is missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(f"needs {', '.join(missing)}: pip install 'segattn_ops[bench]'")


def device(text: str) -> torch.device:
    """cpu, cuda or cuda:N."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda") or (found.type == "cpu" and found.index is not None):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N (got {text!r})")
    return found


def visible(found: torch.device) -> None:
    """Raises :class:`Refused` for a GPU that torch does not see."""
    count = torch.cuda.device_count()
    if found.type == "cuda" and (found.index or 0) >= count:
        raise Refused(f"--device {found}: torch sees {count} CUDA devices")


def writable_folder(path: Path) -> Path:
    """Creates the folder. Raises :class:`Refused` if that, or writing into it, is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"the folder {path} cannot be made: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise Refused(f"the folder {path} is not writable")
    return path


def reproduce(command: str, **options: str) -> str:
    """``command`` with these options in the place of its own, without what is only about its files and its time."""
    dropped = {f"--{name.replace('_', '-')}" for name in options} | {"--output", "--budget"}
    words, kept = iter(shlex.split(command)), []
    for word in words:
        name, _, value = word.partition("=")
        if name in FLAGS:
            continue
        if name in dropped:
            if not value:
                next(words, None)
            continue
        kept.append(word)
    for name, value in options.items():
        kept += [f"--{name.replace('_', '-')}", value]
    return shlex.join([*kept, "--budget", "0"])
