"""The same bits from every run: repeated, with any number of threads, in any schedule of a GPU's threads, in another
process, and under `torch.use_deterministic_algorithms`. Forward, backward and double backward.

tests/reliability/long_determinism.py has 100 runs of every op, dtype and number of threads.
"""

import subprocess
import sys

import pytest
import torch

from ..determinism import BILINEAR, CASES, THREADS, derivatives, digest, make
from ..emulator import build
from ..families import DTYPES, FAMILIES


@pytest.fixture
def threads():
    """Sets the number of threads."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def deterministic():
    """torch.use_deterministic_algorithms, which also fills what torch.empty returns with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def assert_same(got: list[torch.Tensor], expected: list[torch.Tensor], what: str) -> int:
    """The number of compared tensors."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), f"{what}: result {i} has other bits"
    return len(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.operator)
def test_every_number_of_threads(threads, family, dtype, record_property):
    """Of the CPU kernels, at a size with several work units for each thread. Second derivatives of softmax attention
    are PyTorch's matrix products, whose bits depend on the number of threads."""
    problem = make(family, CASES[family.operator].several, dtype)
    kept = None if family.operator in BILINEAR else 1 + len(problem[0])
    threads(1)
    expected = derivatives(family, *problem)[:kept]
    compared = 0
    for count in THREADS[1:]:
        threads(count)
        compared += assert_same(derivatives(family, *problem)[:kept], expected, f"{count} threads")
    record_property("bitwise comparisons", compared)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.operator)
def test_repeated(kernels, request, family, dtype, record_property):
    """On the emulator, each run has another schedule of threads and blocks."""
    problem = make(family, CASES[family.operator].small, dtype, kernels.device)
    emulator = request.getfixturevalue("emulator") if kernels.name == "emulated" else None
    expected = derivatives(family, *problem)
    compared = 0
    for run in range(3):
        if emulator is not None:
            emulator.set_seed(run + 1)
        compared += assert_same(derivatives(family, *problem), expected, f"run {run}")
    record_property("bitwise comparisons", compared)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.operator)
def test_deterministic_algorithms(backend, deterministic, family, dtype, record_property):
    """PyTorch's switch neither refuses an op nor changes a bit, and no result shows memory that no kernel wrote."""
    problem = make(family, CASES[family.operator].small, dtype, backend.device)
    under = derivatives(family, *problem)
    assert all(t.isfinite().all() for t in under)
    torch.use_deterministic_algorithms(False)
    record_property("bitwise comparisons", assert_same(derivatives(family, *problem), under, "without the switch"))


def test_another_process(record_property):
    """The digests of all results of the CPU kernels, in this process and in one with another hash seed and other
    addresses."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.determinism"], cwd=build.ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    there = done.stdout.split()
    here = [digest(family, dtype) for family in FAMILIES for dtype in DTYPES]
    assert there == here
    record_property("bitwise comparisons", len(here))
