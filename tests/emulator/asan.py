"""Runs a Python command under AddressSanitizer with the emulator's asan build:

    python -m tests.emulator.asan -m pytest tests -k emulated

The sanitizer must be loaded before anything allocates memory, hence a new process. All of torch's buffers then come
from the sanitizer's allocator, with red zones around them, so a kernel that reads one element beyond a tensor is found.
"""

import os
import sys

from ..sanitizers import process
from . import build


def environment() -> dict[str, str]:
    """The environment of a process under AddressSanitizer."""
    # Without symbols, which are slow: the launch raises (runtime/asan.cpp), and the runtime names the source location.
    return process.environment("address", symbolize=0) | {"SEGATTN_EMULATOR_VARIANT": "asan"}


if __name__ == "__main__":
    build.build("asan")
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
