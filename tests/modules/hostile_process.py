"""Runs tests/modules/hostile.py in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def opened(kind: str, seed: int, count: int, folder: Path, seconds: int = 3000) -> dict[str, Any]:
    """The counts of :func:`tests.modules.hostile.watched`; fails with the name of the input at which the process
    ended. ``folder`` is its working directory, where the canary would be."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.modules.hostile", kind, str(seed), str(count)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    last = "\n".join(done.stderr.splitlines()[-3:])
    assert done.returncode == 0, f"the process ended with status {done.returncode} at {last}"
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
