"""Every allocation of every call in every dtype fails in turn, on the CPU and emulated:
``python -m pytest tests/reliability/long_failures.py``."""

import pytest

from ..ops.every_call import CALLS
from ..ops.test_failures import check_allocations

DTYPES = ("float64", "float32", "bfloat16", "float16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2])
def test_every_allocation_fails_in_turn_on_the_cpu(record_property, tmp_path, dtype, threads):
    check_allocations(record_property, tmp_path, "cpu", dtype, [call.name for call in CALLS], threads)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_every_allocation_fails_in_turn_emulated(record_property, tmp_path, call, dtype):
    check_allocations(record_property, tmp_path, "emulated", dtype, [call.name])
