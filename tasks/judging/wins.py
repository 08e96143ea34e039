"""How often one model's answers are better than another's, paired by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from tasks.judging.intervals import mean_interval, wilson


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


def wins_of(these: Sequence[float], those: Sequence[float], tie: float) -> Wins:
    """Return the wins of `these` over `those`, the values of both models' answers to the same prompts in one order.

    Equal values tie, as do those that differ by less than `tie`. At least one prompt; minus infinity is allowed. The
    interval is Student's, of 1 for a win, 0.5 for a tie and 0 for a loss: ties make it narrower. One win and one loss
    are added (as Agresti and Coull 1998 do for shares), so that it is never empty.
    """
    assert these and tie >= 0
    points = [
        0.5 if this == that or abs(this - that) < tie else float(this > that)
        for this, that in zip(these, those, strict=True)
    ]
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


def mean_of(values: Sequence[float]) -> Estimate:
    """Return the mean of at least one value, with Student's interval."""
    low, high = mean_interval(values) if len(values) > 1 else (None, None)
    return Estimate(len(values), fmean(values), low, high)


def share_of(hits: Sequence[bool]) -> Estimate:
    """Return the share of hits in at least one, with Wilson's interval."""
    return Estimate(len(hits), fmean(hits), *wilson(sum(hits), len(hits)))
