import os

# Before torch loads OpenMP. Each of two pytest-xdist workers has two threads on two cores: a thread that spins while it
# waits takes a core from the other worker. Five files of the ops' tests took 170 s, and take 83 s so.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

from . import backends
from .emulated import emulator, register_backend, traced, without_wgmma  # noqa: F401
from .emulator.fixtures import emulated_library, variant  # noqa: F401
from .lost_context import pytest_runtest_makereport  # noqa: F401


def _parameters(names: list[str]) -> list:
    marks = {"cuda": [pytest.mark.cuda]}
    return [pytest.param(backends.ALL[name], id=name, marks=marks.get(name, [])) for name in names]


def pytest_generate_tests(metafunc) -> None:
    """`backend` runs over all implementations, `kernels` over those with compiled operators, `cuda_kernels` over the
    CUDA kernels, emulated and on a GPU."""
    names = backends.chosen()
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", _parameters(names), indirect=True)
    if "kernels" in metafunc.fixturenames:
        metafunc.parametrize("kernels", _parameters([n for n in names if n != "reference"]), indirect=True)
    if "cuda_kernels" in metafunc.fixturenames:
        metafunc.parametrize(
            "cuda_kernels", _parameters([n for n in names if n in ("emulated", "cuda")]), indirect=True
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Drops the large cases of the emulator, and puts slow tests first: at the end of a run on several processes,
    each has short tests left."""
    items[:] = [item for item in items if not _is_too_large(getattr(item, "callspec", None))]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def _is_too_large(callspec) -> bool:
    parameters = callspec.params if callspec else {}
    chosen = next((parameters[name] for name in ("backend", "kernels", "cuda_kernels") if name in parameters), None)
    return not getattr(chosen, "runs_large", True) and getattr(parameters.get("case"), "large", False)


@pytest.fixture
def backend(request):
    chosen = request.param
    if chosen.name == "emulated":
        request.getfixturevalue("emulated_library")
        register_backend()
    if reason := backends.why_unavailable(chosen):
        # A missing CPU library must fail the suite, not skip its tests.
        (pytest.skip if chosen.name == "cuda" else pytest.fail)(reason)
    with chosen.selected():
        yield chosen


kernels = cuda_kernels = backend


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
