"""Runs a Python command under AddressSanitizer with the emulator's asan build:

    python -m tests.emulator.asan -m pytest tests -k emulated

The sanitizer must be loaded before anything allocates memory, hence a new process. All of torch's buffers then come
from the sanitizer's allocator, with red zones around them, so a kernel that reads one element beyond a tensor is found.
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
    """The environment of a process under AddressSanitizer."""
    # With libstdc++, whose functions the sanitizer looks up at the start; Python does not load it.
    libraries = [_runtime_library("libasan.so"), _runtime_library("libstdc++.so.6")]
    options = [
        "detect_leaks=0",  # Python's own allocations live to the end
        "halt_on_error=0",  # the launch raises (runtime/asan.cpp)
        "suppress_equal_pcs=0",  # a fault must fail every test that runs into it
        "symbolize=0",  # slow; the runtime names the source location itself
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
