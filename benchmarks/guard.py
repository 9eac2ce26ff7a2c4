"""Runs a command and ends with it whatever the command started: ``python guard.py PARENT COMMAND...``.

The guard leads a process group of its own (its parent starts it so). When the parent is gone, however it ended, the
system tells the guard, and the guard kills the group: no profiler, test worker or compiler outlives the suite. This
file is run by path and needs nothing but the standard library.
"""

import ctypes
import os
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1


def _end_group(*_) -> None:
    os.killpg(0, signal.SIGKILL)


def main(parent: int, command: list[str]) -> int:
    signal.signal(signal.SIGTERM, _end_group)
    # A function, where SIG_IGN would be inherited: the command is to stop at an interrupt and the guard to wait for it.
    signal.signal(signal.SIGINT, lambda *_: None)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before it could be told of
        return 1
    try:
        status = subprocess.Popen(command).wait()
    except OSError as error:
        print(error, file=sys.stderr)
        return 127
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
