"""The fixture that loads the emulated CUDA kernels (imported by tests/conftest.py)."""

import os

import pytest

from . import build


@pytest.fixture(scope="session")
def emulated_library():
    """The emulator's control module, with the operators of `segattn_emulated` registered. SEGATTN_EMULATOR_VARIANT
    selects the build: plain (default), race, asan (see tests/emulator/asan.py) or coverage."""
    return build.load(os.environ.get("SEGATTN_EMULATOR_VARIANT", "plain"))
