"""Confidence intervals of a mean over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, two-sided 95%, for 1 to 30 degrees of freedom; beyond that the last one is kept,
# which is a little wide.
# fmt: off
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on


@dataclass(frozen=True)
class Interval:
    """Mean and sample standard deviation of values, and the t interval of the mean (95%).

    A single value has an unknown deviation (NaN) and an infinite interval.
    """

    mean: float
    deviation: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Interval:
        """Compute the interval of at least one value."""
        mean, count = statistics.mean(values), len(values)
        if count == 1:
            return Interval(mean, math.nan, -math.inf, math.inf)
        deviation = statistics.stdev(values)
        half = _T[min(count - 1, len(_T)) - 1] * deviation / math.sqrt(count)
        return Interval(mean, deviation, mean - half, mean + half)


def spread(values: Sequence[float], form: str = ".4f") -> str:
    """Return "mean ± standard deviation" (of the sample; "?" for a single value)."""
    deviation = f"{statistics.stdev(values):.4f}" if len(values) > 1 else "?"
    return f"{statistics.mean(values):{form}} ± {deviation}"
