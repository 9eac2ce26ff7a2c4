"""Runs a command and kills all its descendants when the parent ends: ``python guard.py PARENT COMMAND...``.

The parent starts the guard as leader of a process group. When the parent ends, however it does, the guard receives a
signal and kills the group, so that no profiler, test worker or compiler outlives the suite. Run by path; needs only the
standard library.
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
    # A function, since the command would inherit SIG_IGN: it must stop at an interrupt while the guard waits for it.
    signal.signal(signal.SIGINT, lambda *_: None)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it ended before prctl took effect
        return 1
    try:
        status = subprocess.Popen(command).wait()
    except OSError as error:
        print(error, file=sys.stderr)
        return 127
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
