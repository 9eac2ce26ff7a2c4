import pytest

from . import exploration

# The emulator takes a thousand times the CPU's time for a call: most calls are the CPU's.
WEIGHTS = {"cpu": 8, "emulated": 3, "reference": 1, "cuda": 4}


def pytest_report_header() -> str | None:
    if exploration.MINUTES:
        return f"fuzzing for {exploration.MINUTES} minutes with SEGATTN_FUZZ_SEED={exploration.SEED}"
    return None


@pytest.fixture(scope="session")
def time_box(request):
    if not exploration.MINUTES:
        return None
    box = exploration.TimeBox(float(exploration.MINUTES))
    for item in request.session.items:
        if "explore" in item.fixturenames:
            backend = item.callspec.params.get("backend") or item.callspec.params["kernels"]
            box.add(item.nodeid, WEIGHTS[backend.name])
    return box


@pytest.fixture
def explore(request, time_box):
    name = "backend" if "backend" in request.fixturenames else "kernels"
    return exploration.Explorer(request, request.getfixturevalue(name), time_box)
