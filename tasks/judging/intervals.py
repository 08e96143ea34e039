"""Where the true value lies with a confidence of 95%: intervals of shares and of means."""

from __future__ import annotations

import math

CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.959963984540054  # of 97.5%: two-sided intervals of 95%


def wilson(hits: float, count: int) -> tuple[float, float]:
    """Return Wilson's interval for a share (1927); `hits` may hold halves, which scipy's takes not."""
    z, share = NORMAL_QUANTILE, hits / count
    middle = share + z * z / (2 * count)
    reach = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    # Where all or none are hits the ends are the share itself, but for rounding.
    return min(share, max(0.0, (middle - reach) / scale)), max(share, min(1.0, (middle + reach) / scale))


def student_quantile(degrees_of_freedom: int) -> float:
    """Return by how many standard errors Student's interval reaches to either side of a mean."""
    from scipy.stats import t  # type: ignore[import-untyped,unused-ignore]

    return float(t.ppf((1 + CONFIDENCE) / 2, degrees_of_freedom))
