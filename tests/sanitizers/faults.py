"""Calls the functions of faults.cpp, broken and corrected, in a process under a sanitizer."""

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tools.compilers import ROOT

from . import build, process

# Function -> the builds that report it. "memcheck" is Valgrind.
FAULTS = {
    "buffer_end": ("address", "memcheck"),
    "scratch_end": ("address", "memcheck"),
    "unwritten": ("memcheck",),
    "signed_overflow": ("undefined",),
    "float_cast": ("undefined",),
    "misaligned": ("undefined",),
    "race": ("thread",),
    "unordered_units": ("thread",),
}


def call(library: ctypes.CDLL, name: str, broken: bool) -> None:
    function = library[f"segattn_fault_{name}"]
    function.restype = ctypes.c_float
    function(ctypes.c_bool(broken))


def main() -> None:
    """Prints "name broken" or "name corrected" for each call that is reported."""
    library = ctypes.CDLL(sys.argv[1])
    reports = Path(os.environ["SEGATTN_SANITIZER_REPORTS"])
    for name in FAULTS:
        for broken in (False, True):
            before = len(process.written(reports))
            call(library, name, broken)
            if len(process.written(reports)) > before:
                print(name, "broken" if broken else "corrected", flush=True)


def reported(variant: str) -> set[str]:
    """What main prints in a process under the sanitizer of a build."""
    with tempfile.TemporaryDirectory() as folder:
        env = process.watching_environment(variant, build.build_faults(variant).parent, Path(folder), "baseline")
        command = [sys.executable, "-m", "tests.sanitizers.faults", str(build.build_faults(variant))]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return set(done.stdout.splitlines())


if __name__ == "__main__":
    main()
