"""The op suite on the emulator's race build: no data races. The build needs a process of its own, so the suite runs in
a subprocess; without float64, whose scalar path is slow here, and float16, whose kernels are bfloat16's."""

import os
import subprocess
import sys

import pytest

from .emulator import build

CHOICE = "(as_exact_as_eager or any_strides) and not float64 and not float16"


def run_op_suite(environment: dict[str, str], families: str) -> None:
    environment = environment | {"SEGATTN_TEST_BACKENDS": "emulated"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["tests/test_ops.py", "-k", f"({families}) and {CHOICE}"]
    done = subprocess.run(
        command, cwd=build.ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("families", ["position", "channel"])
def test_no_races(families):
    build.build("race", "runtime", "kernels")
    run_op_suite(os.environ | {"SEGATTN_EMULATOR_VARIANT": "race"}, families)
