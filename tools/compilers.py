"""Shared by everything that runs a compiler outside setup.py: programs, flags, ninja, the lock of a build folder."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"


def _load_alone(name: str) -> ModuleType:
    # By path: importing it from the package would load the libraries that the process may be about to rebuild.
    path = ROOT / "segattn_ops" / f"_{name}.py"
    spec = importlib.util.spec_from_file_location(f"segattn_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build_tools = _load_alone("build_tools")
files = _load_alone("files")


def compiler() -> str:
    """The C++ compiler: ``CXX``, or g++."""
    return os.environ.get("CXX", "g++")


def nvcc() -> str | None:
    """The path of nvcc, None without one."""
    return build_tools.find_program("nvcc")


def cuobjdump() -> str | None:
    """The path of cuobjdump, of the toolkit or of triton, None without one."""
    packaged = Path(sysconfig.get_paths()["purelib"]) / "triton" / "backends" / "nvidia" / "bin" / "cuobjdump"
    return build_tools.find_program("cuobjdump") or (str(packaged) if packaged.exists() else None)


def output_name(source: Path, suffix: str) -> str:
    """The name of a source's compiled file below a build folder: its path below the root, so that two sources of one
    basename do not collide."""
    return f"{source.relative_to(ROOT).as_posix()}{suffix}"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates a build folder and locks it between processes: pytest-xdist starts several builds at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "build.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run_ninja(folder: Path, ninja_file: str, *targets: str) -> str:
    """Writes ``build.ninja`` and builds the targets, all without names; MAX_JOBS limits the parallel compilers.

    The caller holds the lock of the folder.

    Returns:
        What ninja printed.

    Raises:
        RuntimeError: with the compiler's output, where the build fails.
    """
    path = folder / "build.ninja"
    if not path.exists() or path.read_text() != ninja_file:
        path.write_text(ninja_file)
    program = shutil.which("ninja")
    command = [program] if program else [sys.executable, "-m", "ninja"]
    command += ["-C", str(folder), *targets]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the build in {folder} failed:\n{done.stdout}")
    return done.stdout


def ninja_path(path: object) -> str:
    """A path as ninja reads it in a build line."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")
