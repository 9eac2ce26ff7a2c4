"""More rounds of the calls in eight threads: ``python -m pytest tests/reliability/long_concurrency.py``."""

from ..ops.test_concurrency import BITWISE, check_calls_in_threads, check_large_calls_in_threads


def test_all_calls_in_eight_threads(record_property):
    check_calls_in_threads(BITWISE, 100, record_property)


def test_parallel_calls_in_eight_threads(record_property):
    check_large_calls_in_threads(30, record_property)
