"""The fixtures of the emulator's builds (imported by tests/conftest.py)."""

import os
from collections.abc import Iterator

import pytest

from . import build

IN_ASAN = os.environ.get("SEGATTN_EMULATOR_VARIANT") == "asan"
# AddressSanitizer must be loaded first, so its tests run in a separate process (tests/tools/test_emulator.py).
HERE = ["asan"] if IN_ASAN else ["plain", "race"]


@pytest.fixture(scope="session")
def emulated_library():
    """The emulator's control module, with the operators of `segattn_emulated` registered. SEGATTN_EMULATOR_VARIANT
    selects the build: plain (default), race, asan (see tests/emulator/asan.py) or coverage."""
    return build.load(os.environ.get("SEGATTN_EMULATOR_VARIANT", "plain"))


@pytest.fixture(params=HERE)
def variant(request) -> Iterator[str]:
    """The builds of the emulator's own tests, with the settings that they start from."""
    control = build.runtime(request.param)
    control.set_device(90)
    control.set_seed(0)
    control.set_mma_rounding("truncate")
    yield request.param
    control.set_seed(0)
    control.set_mma_rounding("truncate")
