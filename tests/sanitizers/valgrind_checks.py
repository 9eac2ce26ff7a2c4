"""Valgrind's memcheck on every operator of the CPU library, and on the planted faults. It takes minutes:

    python -m pytest tests/sanitizers/valgrind_checks.py

Errors count where a frame of the library is in the stack: Python and torch have others.
"""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tools.compilers import ROOT

from . import build, faults

pytestmark = pytest.mark.skipif(shutil.which("valgrind") is None, reason="Valgrind is not installed")
INSTRUCTION_SET = "avx2"  # Valgrind knows no AVX-512


def errors(tmp_path: Path, library: str, *command: str) -> list[list[str]]:
    """The functions in the stacks of the errors that a library is part of. Not of the leaks, which Valgrind always
    looks for when it writes XML: the thread-local storage of a thread that still runs is "possibly lost"."""
    log = tmp_path / "valgrind.xml"
    env = os.environ | {
        "ATEN_CPU_CAPABILITY": "avx2",
        "OMP_NUM_THREADS": "1",
        "PYTHONMALLOC": "malloc",
        "PYTHONSAFEPATH": "1",
        "PYTHONPATH": os.pathsep.join([str(build.build("memcheck", INSTRUCTION_SET)), str(ROOT)]),
        "SEGATTN_CPU_CAPABILITY": INSTRUCTION_SET,
        "SEGATTN_SANITIZER_REPORTS": str(tmp_path / "none"),
    }
    (tmp_path / "none").mkdir()
    valgrind = ["valgrind", "--xml=yes", f"--xml-file={log}", "--error-limit=no", "--num-callers=30"]
    done = subprocess.run(
        [*valgrind, sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = ElementTree.parse(log).getroot().iter("error")
    stacks = [error.iter("frame") for error in found if not error.findtext("kind", "").startswith("Leak_")]
    frames = [[(f.findtext("obj", ""), f.findtext("fn", "?")) for f in stack] for stack in stacks]
    return [[name for _, name in stack] for stack in frames if any(library in path for path, _ in stack)]


def test_planted_faults(tmp_path, record_property):
    expected = {name for name, reported_by in faults.FAULTS.items() if "memcheck" in reported_by}
    library = str(build.build_faults("memcheck"))
    found = {
        name for stack in errors(tmp_path, "faults.so", "-m", "tests.sanitizers.faults", library) for name in stack
    }
    caught = {name for name in faults.FAULTS if f"segattn_fault_{name}" in found}
    record_property("faults planted", len(expected))
    record_property("faults caught", len(expected & caught))
    assert caught == expected


def test_every_operator(tmp_path, record_property):
    found = errors(tmp_path, "_cpu_avx2.abi3.so", "-m", "tests.sanitizers.smoke")
    record_property("reports of Valgrind", len(found))
    assert not found, found[:5]
