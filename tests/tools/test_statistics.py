"""Intervals of medians, verdicts and drift of the benchmarks."""

import math
import random

import pytest

from benchmarks import statistics


def draws(count: int, middle: float = 1.0, spread: float = 0.1, seed: int = 0) -> list[float]:
    generator = random.Random(seed)
    return [middle * math.exp(generator.gauss(0.0, spread)) for _ in range(count)]


@pytest.mark.parametrize("count", [2, 3, 5, 6, 9, 20])
def test_the_interval_covers_the_median_as_often_as_it_says(count):
    missed = 0
    for seed in range(400):
        found = statistics.summary(draws(count, seed=seed))
        assert found["low"] <= found["median"] <= found["high"]
        missed += not found["low"] <= 1.0 <= found["high"]
    assert missed / 400 < 0.05 + 0.033  # three standard errors of 400 trials


def test_intervals_from_order_statistics():
    """Six values cover the median between the first and the last with 1 - 2 / 2**6 = 96.9%, nine between the second and
    the eighth with 96.1%."""
    assert statistics.interval([3.0, 1.0, 2.0, 6.0, 5.0, 4.0]) == (1.0, 6.0)
    assert statistics.interval([float(value) for value in range(1, 10)]) == (2.0, 8.0)
    outlier = statistics.interval([*range(1, 9), 1000])
    assert outlier == (2.0, 8.0)


def test_intervals_of_few_values():
    low, high = statistics.interval([1.0, 1.0, 1.0])
    assert low == pytest.approx(1.0) and high == pytest.approx(1.0)
    low, high = statistics.interval([0.9, 1.0, 1 / 0.9])  # Student's 4.303 of two degrees of freedom
    assert math.log(high) == pytest.approx(4.303 * -math.log(0.9) / math.sqrt(3), rel=1e-3)
    assert low * high == pytest.approx(1.0)
    assert statistics.interval([1.0]) is None
    assert statistics.summary([2.0]) == {"times": [2.0], "median": 2.0, "low": None, "high": None}


@pytest.mark.parametrize("values", [[1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [1.0, math.inf]])
def test_times_are_positive(values):
    with pytest.raises(ValueError, match="positive and finite"):
        statistics.interval(values)


def test_verdicts():
    ours = draws(7, spread=0.01)
    slow = [2 * time for time in draws(7, spread=0.01, seed=1)]
    assert statistics.ratio(ours, slow)["verdict"] == "faster"
    assert statistics.ratio(ours, slow)["median"] == pytest.approx(2.0, rel=0.05)
    assert statistics.ratio(slow, ours)["verdict"] == "slower"
    same = [time * 1.001 for time in ours]
    assert statistics.ratio(ours, same)["verdict"] == "level"
    assert statistics.ratio(ours, draws(7, spread=0.3, seed=2))["verdict"] == "unclear"
    assert statistics.ratio(ours[:1], slow[:1])["verdict"] == "unclear"
    assert statistics.ratio(ours[:3], slow[:3])["verdict"] == "faster"
    assert statistics.ratio([1.0, 1.3, 0.8], [1.3, 1.2, 1.4])["verdict"] == "unclear"
    assert {statistics.verdict(*ends) for ends in [(1.1, 2), (0.99, 1.01), (0.5, 0.9), (0.5, 2)]} == set(
        statistics.VERDICTS
    )


def test_rounds_are_paired():
    """A disturbance of a whole round, up to ten times as long, leaves the ratio what it is."""
    disturbance = [1.0, 3.0, 1.0, 10.0, 2.0, 1.5]
    ours = [0.1 * factor for factor in disturbance]
    theirs = [0.11 * factor for factor in disturbance]
    found = statistics.ratio(ours, theirs)
    assert (found["low"], found["high"], found["verdict"]) == (pytest.approx(1.1), pytest.approx(1.1), "faster")
    for rounds in ([1.0, 2.0], []):
        with pytest.raises(ValueError, match="paired"):
            statistics.ratio([1.0] * (len(rounds) - 1), rounds)


def test_drift():
    steady = statistics.drift(draws(9, spread=0.02))
    assert not steady["noted"] and steady["low"] < 0 < steady["high"]
    warmer = statistics.drift([time * 1.03**round for round, time in enumerate(draws(9, spread=0.01))])
    assert warmer["noted"] and warmer["change"] == pytest.approx(1.03**8 - 1, rel=0.25)
    faster = statistics.drift([time * 0.97**round for round, time in enumerate(draws(9, spread=0.01))])
    assert faster["noted"] and faster["change"] < 0
    assert not statistics.drift([1 + 1e-4 * round for round in range(9)])["noted"]  # sure, but nothing to a user
    assert statistics.drift([1.0, 2.0, 3.0]) is None
