"""100 runs of every op, dtype and pass give the same bits: with 1 to 8 threads in turn, and on the emulator with a new
schedule for each. Takes minutes: pytest collects it only by name."""

import pytest
import torch

from ..determinism import BILINEAR, CASES, THREADS, derivatives, make
from ..families import DTYPES, FAMILIES

RUNS = 100


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.operator)
def test_100_runs(kernels, request, family, dtype, record_property):
    emulator = request.getfixturevalue("emulator") if kernels.name == "emulated" else None
    case = CASES[family.operator].small if emulator is not None else CASES[family.operator].several
    problem = make(family, case, dtype, kernels.device)
    # Second derivatives of softmax attention are PyTorch's matrix products: the same bits for one number of threads.
    kept = None if family.operator in BILINEAR else 1 + len(problem[0])
    before = torch.get_num_threads()
    expected: dict[int, list[torch.Tensor]] = {}
    compared = 0
    try:
        for run in range(RUNS):
            count = THREADS[run % len(THREADS)] if kernels.name == "cpu" else before
            torch.set_num_threads(count)
            if emulator is not None:
                emulator.set_seed(run)
            found = derivatives(family, *problem)
            same_threads = expected.setdefault(count, found)
            first = next(iter(expected.values()))
            for i, result in enumerate(found):
                wanted = (first if kept is None or i < kept else same_threads)[i]
                assert torch.equal(result, wanted), f"run {run}, {count} threads: result {i} has other bits"
                compared += result is not wanted
    finally:
        torch.set_num_threads(before)
    record_property("bitwise comparisons", compared)
