"""The fixture through which the op suite gets the emulated CUDA kernels (tests/conftest.py imports it)."""

import os

import pytest

from . import build


@pytest.fixture(scope="session")
def emulated_library():
    """The control module of the emulator, the operators of `segattn_emulated` registered. SEGATTN_EMULATOR_VARIANT
    chooses the build: plain (default), race, asan (see tests/emulator/asan.py) or coverage."""
    return build.load(os.environ.get("SEGATTN_EMULATOR_VARIANT", "plain"))
