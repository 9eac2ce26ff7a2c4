"""Plants every fault of faults.toml in a copy of the source tree and expects its tests to fail.

    python -m pytest tests/mutation/run_faults.py -n 2 --dist loadgroup    # all; collected only where it is named
    python -m pytest tests/mutation/run_faults.py -k "gamma"               # those whose build, id or kind contains it

A worker has its copy, with its builds, in build/mutation, or in the folder SEGATTN_MUTATION_COPIES. The emulator is
built for the first fault in CUDA sources, which takes minutes. A fault that does not compile, and one whose tests do
not pass without it, is an error of its entry.
"""

import os

import pytest

from .faults import COPIES, Copy, Fault, failures, listed

_, FAULTS = listed()


def parameter(fault: Fault):
    """Faults that need one build are for one worker."""
    marks = [pytest.mark.xdist_group(f"{fault.builds} {fault.variant}")] if fault.builds else []
    return pytest.param(fault, id=f"{fault.builds or 'python'}: {fault.id}: {fault.kind}", marks=marks)


@pytest.fixture(scope="session")
def copy() -> Copy:
    return Copy(COPIES / os.environ.get("PYTEST_XDIST_WORKER", "alone"))


@pytest.mark.parametrize("fault", [parameter(fault) for fault in FAULTS])
def test_the_suite_catches(copy: Copy, fault: Fault, record_property) -> None:
    copy.require_passing(fault)
    with copy.planted(fault):
        record_property("faults planted", 1)
        done = copy.test(fault)
    caught_by = failures(done.stdout)
    assert done.returncode in (0, 1), f"{fault.id}: pytest ended with {done.returncode}\n{done.stdout[-4000:]}"
    print(f"{fault.id}: caught by {caught_by[0]}" if caught_by else f"{fault.id} survives")
    assert caught_by, f"{fault.id} survives {' '.join(fault.tests)}\n{done.stdout[-1000:]}"
    record_property("faults caught", 1)
    record_property(f"faults caught: {fault.kind}", 1)
