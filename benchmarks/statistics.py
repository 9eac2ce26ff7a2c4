"""Intervals of repeated times, verdicts on two rivals, and drift: what a table may conclude from few rounds.

The interval of a median is free of assumptions from six rounds on: order statistics, whose coverage is at least
CONFIDENCE. Fewer rounds cannot give one, so the interval is Student's, of the logarithms: it assumes that they are
normal, and is wide where the rounds are few. One round has no interval.

Two rivals are compared by the ratios of their times within each round, because a round's disturbance affects both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95
ORDERED_FROM = 6  # rounds: 1 - 2 / 2**n, the most that order statistics of n rounds cover, passes CONFIDENCE
LEVEL = 0.02  # ratios within 1 +- this are no difference to a user, however sure
VERDICTS = ("faster", "level", "slower", "unclear")
METHOD = (
    f"{CONFIDENCE:.0%} interval of the median: order statistics from {ORDERED_FROM} rounds on, Student's of the "
    "logarithms for fewer"
)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The interval of the median of positive values at CONFIDENCE; None for fewer than two."""
    if not all(value > 0 and math.isfinite(value) for value in values):
        raise ValueError(f"values must be positive and finite (got {list(values)})")
    count = len(values)
    if count < 2:
        return None
    from scipy import stats

    if count >= ORDERED_FROM:
        found = stats.quantile_test(values, q=1.0, p=0.5).confidence_interval(CONFIDENCE)
        return float(found.low), float(found.high)
    logs = [math.log(value) for value in values]
    error = statistics.stdev(logs) / math.sqrt(count)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    middle = statistics.fmean(logs)
    return math.exp(middle - reach), math.exp(middle + reach)


def summary(times: Sequence[float]) -> dict:
    """``{"times", "median", "low", "high"}`` of repeats of one figure; low and high are None for a single one."""
    low, high = interval(times) or (None, None)
    return {"times": list(times), "median": statistics.median(times), "low": low, "high": high}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict:
    """How many times as fast ours is, from the times of interleaved rounds: ``{"median", "low", "high", "verdict"}``
    of theirs / ours, round by round.

    The verdict is on ours: "level" if the interval is within LEVEL of 1, else "faster" or "slower" if it excludes 1,
    else "unclear". One round is always "unclear".

    Raises:
        ValueError: the rounds differ in number, or there are none.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"rounds must be paired (got {len(ours)} and {len(theirs)} times)")
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    found = summary(ratios)
    del found["times"]
    return found | {"verdict": verdict(found["low"], found["high"])}


def verdict(low: float | None, high: float | None) -> str:
    """The verdict on an interval of theirs / ours."""
    if low is None or high is None:
        return "unclear"
    if low >= 1 / (1 + LEVEL) and high <= 1 + LEVEL:
        return "level"
    if low > 1:
        return "faster"
    return "slower" if high < 1 else "unclear"


DRIFT_FROM = 4  # rounds: fewer have no slope that chance does not explain


def drift(times: Sequence[float]) -> dict | None:
    """``{"change", "low", "high", "noted"}``: how much the time grew from the first round to the last, as a fraction of
    it, by the Theil-Sen slope of the logarithms. Noted where the interval excludes 0 and the change exceeds LEVEL.
    None for fewer than DRIFT_FROM rounds."""
    if len(times) < DRIFT_FROM:
        return None
    from scipy import stats

    slope, _, low, high = stats.theilslopes([math.log(time) for time in times], alpha=CONFIDENCE)
    change, low, high = (math.expm1(value * (len(times) - 1)) for value in (slope, low, high))
    return {"change": change, "low": low, "high": high, "noted": (low > 0 or high < 0) and abs(change) > LEVEL}
