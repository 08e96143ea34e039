"""How often one model's answers are better than another's, paired by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from tasks.judging.intervals import bootstrap_interval, mean_interval, wilson


class Wins(NamedTuple):
    """Over how many prompts one model wins, ties and loses; the win rate counts ties as halves, with its interval."""

    prompts: int
    wins: int
    ties: int
    losses: int
    win_rate: float
    low: float
    high: float


class Estimate(NamedTuple):
    """A mean or a share over prompts, with its 95% interval; a mean of one value has none."""

    prompts: int
    value: float
    low: float | None
    high: float | None


def points_of(these: Sequence[float], those: Sequence[float], tie: float) -> list[float]:
    """Return 1 where the value of `these` wins over that of `those`, 0 where it loses, a half where they tie.

    Equal values tie, as do those that differ by less than `tie`; minus infinity is allowed. Values know nothing of left
    and right: asked in the other order, they give the opposite.
    """
    assert tie >= 0
    return [
        0.5 if this == that or abs(this - that) < tie else float(this > that)
        for this, that in zip(these, those, strict=True)
    ]


def wins_of(points: Sequence[float]) -> Wins:
    """Return the wins that points stand for (1 a win, a half a tie, 0 a loss), at least one.

    The interval is Student's: ties make it narrower. One win and one loss are added (as Agresti and Coull 1998 do for
    shares), so that it is never empty.
    """
    rate, (low, high) = fmean(points), mean_interval([*points, 1.0, 0.0])
    return Wins(
        prompts=len(points),
        wins=points.count(1.0),
        ties=points.count(0.5),
        losses=points.count(0.0),
        win_rate=rate,
        low=max(0.0, min(rate, low)),
        high=min(1.0, max(rate, high)),
    )


def chance_of(points: Sequence[float]) -> float:
    """Return the two-sided p-value of such a win rate between equals: below 5% where `wins_of`'s interval has no half.

    Student's test, with the same win and loss added.
    """
    from scipy.stats import ttest_1samp  # type: ignore[import-untyped,unused-ignore]

    return float(ttest_1samp([*points, 1.0, 0.0], 0.5).pvalue)


def mean_of(values: Sequence[float]) -> Estimate:
    """Return the mean of at least one value, with Student's interval."""
    low, high = mean_interval(values) if len(values) > 1 else (None, None)
    return Estimate(len(values), fmean(values), low, high)


def share_of(hits: Sequence[bool]) -> Estimate:
    """Return the share of hits in at least one, with Wilson's interval."""
    return Estimate(len(hits), fmean(hits), *wilson(sum(hits), len(hits)))


def gain_of(differences: Sequence[float]) -> Estimate:
    """Return the mean of at least one difference by prompt, with the paired bootstrap's interval."""
    low, high = bootstrap_interval(differences) if len(differences) > 1 else (None, None)
    return Estimate(len(differences), fmean(differences), low, high)


def in_words(found: Estimate, pattern: str) -> str:
    """Return an estimate for people, its interval on a second line."""
    if found.low is None or found.high is None:
        return pattern.format(found.value)
    return f"{pattern.format(found.value)}\n{pattern.format(found.low)} to {pattern.format(found.high)}"
