"""The sanitizers' builds of the CPU library: each reports its planted faults, and a sample of the ops has none."""

import os
import subprocess
import sys

import pytest

from tools.compilers import ROOT

from ..sanitizers import faults, process

# A family for each: what builds and runs in a minute. `make sanitize` runs the rest.
SAMPLES = {"address": "criss_cross", "undefined": "channel", "thread": "position"}


@pytest.fixture(params=sorted(process.RUNTIMES))
def sanitizer(request) -> str:
    try:
        process.runtime_library(process.RUNTIMES[request.param])
    except (FileNotFoundError, OSError, subprocess.CalledProcessError) as error:
        missing = pytest.fail if os.environ.get("SEGATTN_REQUIRE_SANITIZERS") == "1" else pytest.skip
        missing(f"the compiler has no {request.param} sanitizer: {error}")
    return request.param


def test_planted_faults_are_reported_and_corrected_ones_are_not(sanitizer, record_property):
    expected = {f"{name} broken" for name, reported_by in faults.FAULTS.items() if sanitizer in reported_by}
    found = faults.reported(sanitizer)
    record_property("faults planted", len(expected))
    record_property("faults caught", len(expected & found))
    assert found == expected


@pytest.mark.slow
def test_a_sample_of_the_ops_has_no_reports(sanitizer):
    """The kernels of the baseline."""
    family = SAMPLES[sanitizer]
    chosen = f"as_exact_as_eager and {family}_ and (float32 or bfloat16)"
    command = [
        sys.executable,
        "-m",
        "tests.sanitizers",
        sanitizer,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
    ]
    env = os.environ | {
        "SEGATTN_CPU_CAPABILITY": "baseline",
        "SEGATTN_SANITIZER_FAMILY": family,
        "SEGATTN_TEST_BACKENDS": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, "tests/ops/test_ops.py", "-k", chosen],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
