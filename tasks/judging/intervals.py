"""95% confidence intervals of shares, of means and of differences; tests of several rounds at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

import numpy as np

RESAMPLES = 1000  # of a bootstrap
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


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the bootstrap's percentile interval for the mean of at least two values (Efron 1979).

    Given differences by prompt, it is the paired bootstrap. The draws are always the same: so is the interval.
    """
    numbers_N = np.asarray(values, dtype=float)
    drawn_RN = np.random.default_rng(0).integers(len(numbers_N), size=(RESAMPLES, len(numbers_N)), dtype=np.int32)
    low, high = np.quantile(numbers_N[drawn_RN].mean(axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted so that all of them together err as rarely as one (Holm 1979), in the given order."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted
