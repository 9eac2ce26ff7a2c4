"""The hook of tests/lost_context.py and the options of benchmarks/gpu/tests.py, on tests of a run of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import selection, state, tests
from benchmarks.gpu.children import Finished
from tools.compilers import ROOT

CONFTEST = """
from tests.lost_context import pytest_runtest_makereport
"""
CASES = """
import ctypes
import os

import pytest
import torch

lost = False
torch.cuda.is_initialized = lambda: True

def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nCompile with TORCH_USE_CUDA_DSA")

torch.cuda.synchronize = synchronize

@pytest.mark.cuda
@pytest.mark.parametrize("number", range(8))
def test_kernel(number):
    global lost
    if number == 3:
        lost = True
        assert False, "wrong result"
    if number == 5 and os.environ.get("HANGS"):
        ctypes.PyDLL(None).sleep(60)  # no Python runs before it returns, as in a call that waits for the device
    synchronize()

@pytest.mark.cuda
def test_wrong_result():
    assert False, "this one leaves the context usable"
"""


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What the suite's piece adds to the command of its tests."""
    commands = []

    def record(all_commands, *_):
        commands.extend(all_commands)
        return [Finished(0, "", 1.0)]

    monkeypatch.setattr("benchmarks.gpu.children.run", record)
    tests.run(state.State(tmp_path / "gpu.json", False, None), state.Clock(100), selection.Selection(), "cuda")
    (command,) = commands
    return command[command.index("-W") :]


def run(folder: Path, *arguments: str, **environment: str) -> str:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_cases.py").write_text(CASES)
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "-o", "markers=cuda", *arguments, folder],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return finished.stdout + finished.stderr


def outcomes(output: str) -> dict[str, set[str]]:
    """The tests by outcome."""
    found: dict[str, set[str]] = {}
    for outcome, name in re.findall(r"^(PASSED|FAILED) \S+::(\S+)", output, re.MULTILINE):
        found.setdefault(outcome, set()).add(name)
    return found


def test_one_lost_context_fails_one_test(tmp_path: Path, options: list[str]) -> None:
    """Also a test that hangs fails alone."""
    options[options.index("-n") + 1] = "2"
    options = [option.replace(f"_timeout={tests.TEST_SECONDS}", "_timeout=3") for option in options]
    output = run(tmp_path, *options, HANGS="1")
    expected = {"test_kernel[3]", "test_kernel[5]", "test_wrong_result"}
    assert outcomes(output)["FAILED"] == expected, output
    assert outcomes(output)["PASSED"] == {f"test_kernel[{n}]" for n in (0, 1, 2, 4, 6, 7)}
    assert "test_kernel[3]: the CUDA context is lost (CUDA error: an illegal memory access was encountered)" in output
    assert "wrong result" in output and "Timeout" in output


def test_in_one_process_the_run_ends(tmp_path: Path) -> None:
    output = run(tmp_path)
    assert outcomes(output) == {"PASSED": {f"test_kernel[{n}]" for n in range(3)}, "FAILED": {"test_kernel[3]"}}
    assert "the CUDA context is lost (CUDA error: an illegal memory access was encountered)" in output
