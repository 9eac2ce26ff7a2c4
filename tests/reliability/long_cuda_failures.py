"""Every launch of every call, and every call of the CUDA runtime, fails in turn, with all kernels, emulated:
``python -m pytest tests/reliability/long_cuda_failures.py``."""

import pytest

from ..cuda.test_failures import KERNELS, check_launches, check_runtime_calls, emulated_backend  # noqa: F401
from ..ops.every_call import CALLS

each_call = pytest.mark.parametrize("name", [call.name for call in CALLS])
each_set_of_kernels = pytest.mark.parametrize("chosen", KERNELS)


@each_call
@each_set_of_kernels
def test_each_launch_fails(emulator, record_property, name, chosen):
    check_launches(emulator, record_property, name, chosen, after_each=True)


@each_call
@each_set_of_kernels
def test_each_call_of_the_runtime_fails(emulator, record_property, name, chosen):
    check_runtime_calls(emulator, record_property, name, chosen)
