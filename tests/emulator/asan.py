"""Runs a Python command under AddressSanitizer with the emulator's asan build:

    python -m tests.emulator.asan -m pytest tests -k emulated

The sanitizer has to be in the process before anything else allocates memory, hence a process of its own. Every buffer
of torch then comes from the sanitizer's allocator, with red zones around it, so a kernel that reads one element beyond
a tensor is found.
"""

import os
import subprocess
import sys

from tools.compilers import compiler

from . import build


def _runtime_library(name: str) -> str:
    command = [compiler(), f"-print-file-name={name}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if path == name:
        raise FileNotFoundError(f"{compiler()} has no {name}")
    return path


def environment() -> dict[str, str]:
    """The environment for such a process."""
    # libstdc++ as well: the sanitizer looks for its functions at the start, and Python itself does not load it.
    libraries = [_runtime_library("libasan.so"), _runtime_library("libstdc++.so.6")]
    options = [
        "detect_leaks=0",  # Python's own allocations live to the end
        "halt_on_error=0",  # the launch raises instead (runtime/asan.cpp)
        "suppress_equal_pcs=0",  # the same fault has to fail every test that meets it
        "symbolize=0",  # slow, and the runtime names the place itself
        "allocator_may_return_null=1",
    ]
    return os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": ":".join(options),
        "SEGATTN_EMULATOR_VARIANT": "asan",
    }


if __name__ == "__main__":
    build.build("asan")
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
