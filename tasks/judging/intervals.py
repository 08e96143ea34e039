"""95% confidence intervals of shares and of means."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.959963984540054  # of 97.5%: for two-sided 95% intervals


def wilson(hits: float, count: int) -> tuple[float, float]:
    """Return Wilson's interval for a share (1927); `hits` may hold halves, which scipy doesn't accept."""
    z, share = NORMAL_QUANTILE, hits / count
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # If all or none are hits, one end is the share itself, except for rounding.
    return min(share, max(0.0, (middle - reach) / scale)), max(share, min(1.0, (middle + reach) / scale))


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return Student's interval for the mean of at least two values."""
    reach = student_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values) - reach, fmean(values) + reach


def student_quantile(degrees_of_freedom: int) -> float:
    """Return the half-width of Student's interval of a mean, in standard errors."""
    from scipy.stats import t  # type: ignore[import-untyped,unused-ignore]

    return float(t.ppf((1 + CONFIDENCE) / 2, degrees_of_freedom))
