"""Intervals hold what they promise; p-values and win rates at equal lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap

from tasks.judging.intervals import RESAMPLES, bootstrap_interval, holm, wilson
from tasks.judging.lengths import controlled_win_rate
from tasks.judging.wins import chance_of, gain_of, wins_of

NUM_TRIALS = 1000
NUM_PROMPTS = 300
Bounds = tuple[float | None, float | None]


def judged(rng: np.random.Generator, win: float, tie: float) -> list[float]:
    """What a judge says of prompts, who finds the first answer better, or neither, with these probabilities."""
    points: list[float] = rng.choice([1.0, 0.5, 0.0], NUM_PROMPTS, p=[win, tie, 1 - win - tie]).tolist()
    return points


def of_wins(points: Sequence[float], rng: np.random.Generator) -> Bounds:
    return wins_of(points)[-2:]


def of_controlled(points: Sequence[float], rng: np.random.Generator) -> Bounds:
    found = controlled_win_rate(points, rng.integers(-20, 20, len(points)).tolist())
    return found.low, found.high


def of_gain(points: Sequence[float], rng: np.random.Generator) -> Bounds:
    found = gain_of([point - 0.5 for point in points])
    assert found.low is not None and found.high is not None
    return found.low + 0.5, found.high + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("interval", [of_wins, of_controlled, of_gain])
@pytest.mark.parametrize(("win", "tie"), [(0.5, 0.0), (0.3, 0.4), (0.8, 0.1)])
def test_a_win_rates_interval_holds_the_truth_in_95_of_100_trials(
    interval: Callable[[Sequence[float], np.random.Generator], Bounds], win: float, tie: float
) -> None:
    rng = np.random.default_rng(2)
    truth, covered = win + tie / 2, 0
    for _ in range(NUM_TRIALS):
        low, high = interval(judged(rng, win, tie), rng)
        assert low is not None and high is not None
        covered += low <= truth <= high
    assert 0.93 <= covered / NUM_TRIALS <= 0.97


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
def test_a_shares_interval_holds_the_truth_in_95_of_100_trials(share: float) -> None:
    hits = np.random.default_rng(1).binomial(NUM_PROMPTS, share, NUM_TRIALS)
    intervals = [wilson(float(each), NUM_PROMPTS) for each in hits]
    assert 0.93 <= sum(low <= share <= high for low, high in intervals) / NUM_TRIALS <= 0.97


def test_the_bootstrap_is_scipys() -> None:
    values = np.random.default_rng(0).normal(1, 2, 200)
    theirs: Any = bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    ours = bootstrap_interval(values.tolist())
    # the quantile of so many draws has this error
    error = np.std(values) / math.sqrt(len(values)) * 2.7 * math.sqrt(1 / RESAMPLES)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=4 * error)
    assert bootstrap_interval(values.tolist()) == ours
    assert bootstrap_interval([2.0] * 9) == (2, 2)


def test_holm_worked_by_hand() -> None:
    # the least of four counts four times, the next three times, and none is below one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []


def test_a_p_value_is_below_5_percent_where_the_interval_leaves_out_a_half() -> None:
    rng = np.random.default_rng(3)
    for win in (0.4, 0.45, 0.5, 0.55, 0.6):
        points = judged(rng, win, 0.2)
        found = wins_of(points)
        assert (chance_of(points) < 0.05) == (not found.low <= 0.5 <= found.high)
    assert chance_of([0.5] * 20) == 1


def test_a_judge_who_likes_length_alone_gives_half_at_equal_lengths() -> None:
    rng = np.random.default_rng(4)
    lengths = rng.normal(8, 10, 4000)  # the version writes more
    chances = 1 / (1 + np.exp(-2 * np.tanh(lengths / np.std(lengths))))
    points = (rng.random(4000) < chances).astype(float).tolist()
    found = controlled_win_rate(points, lengths.tolist())
    assert np.mean(points) > 0.65
    assert found.low is not None and found.high is not None
    assert found.low < 0.5 < found.high
    assert found.high - found.low < 0.06
    # who also likes the version has that intercept, whatever the lengths
    likes = 1 / (1 + np.exp(-(1 + 2 * np.tanh(lengths / np.std(lengths)))))
    found = controlled_win_rate((rng.random(4000) < likes).astype(float).tolist(), lengths.tolist())
    assert found.value == pytest.approx(1 / (1 + math.exp(-1)), abs=0.03)


def test_at_equal_lengths_everywhere_it_is_the_plain_rate_and_finite_where_the_longer_always_wins() -> None:
    points = [1.0, 1.0, 0.5, 0.0, 1.0, 1.0]
    found = controlled_win_rate(points, [3] * 6)
    assert controlled_win_rate(points, [0] * 6).value == pytest.approx((4.5 + 1) / 8, abs=1e-6)  # one of each is added
    assert found.low is not None and found.high is not None
    assert found.low < found.value < found.high
    longer = controlled_win_rate([1.0] * 20 + [0.0] * 20, [5] * 20 + [-5] * 20)
    assert longer.value == pytest.approx(0.5, abs=1e-6)
    mirrored = controlled_win_rate([1 - point for point in points], [-2, 4, 1, 0, 3, 2])
    straight = controlled_win_rate(points, [2, -4, -1, 0, -3, -2])
    assert mirrored.value + straight.value == pytest.approx(1, abs=1e-6)
