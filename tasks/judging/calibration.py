"""Calibrate raw ranking scores on held-out labels, and choose the threshold of safety (Llama 2, section 3.2.3).

A model that learnt from pairs alone gives scores without a zero or a unit. A line through them makes them log-odds, in
nats: that an answer is safe (Platt 1999), or that it is preferred to an average held-out one. Labels are smoothed as
Platt's are, by one of each kind, so that labels which scores separate perfectly give no infinite slope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MAX_STEPS = 100  # of Newton's method, which takes about ten
TOLERANCE = 1e-9  # nats
Numbers = npt.NDArray[np.float64]


class Line(NamedTuple):
    """How scores become log-odds."""

    slope: float
    intercept: float

    def log_odds(self, score: float) -> float:
        """Return a score's log-odds, nats."""
        return self.slope * score + self.intercept

    def probability(self, score: float) -> float:
        """Return a score's probability."""
        return float(np.exp(-np.logaddexp(0.0, -self.log_odds(score))))


class Threshold(NamedTuple):
    """An answer counts as unsafe if its probability of being safe is below `threshold`; how often that is right."""

    threshold: float
    precision: float | None  # share of the answers called unsafe that are; None: none is called so
    recall: float  # share of the unsafe answers that are called so
    labels: int
    unsafe: int


def fit_safety(scores: Sequence[float], safe: Sequence[bool]) -> Line:
    """Return the line from scores to the log-odds of being safe, given labels.

    Raises ValueError when labels are missing, all the same, or contradicted by the scores.
    """
    num_safe = sum(safe)
    num_unsafe = len(safe) - num_safe
    if not (num_safe and num_unsafe):
        raise ValueError(
            f"of the {len(safe)} held-out answers with a label of safety, {num_safe} are safe and {num_unsafe} unsafe: "
            "both are needed to calibrate the safety model's scores; collect more safety preferences"
        )
    _check_finite(scores, "safety")
    targets = np.where(safe, (num_safe + 1) / (num_safe + 2), 1 / (num_unsafe + 2))
    line = _fitted(np.asarray(scores, dtype=np.float64), targets, has_intercept=True)
    if line.slope <= 0:
        raise ValueError(
            f"the safety model scores the held-out answers labelled unsafe no lower than the {num_safe} safe ones: it "
            "can't tell them apart; train it on more preferences"
        )
    return line


def fit_helpfulness(chosen: Sequence[float], rejected: Sequence[float]) -> Line:
    """Return the line from scores to the log-odds of being preferred to an average answer, given the scores of pairs.

    Raises ValueError when there are no pairs, and when the scores contradict the choices.
    """
    if not chosen:
        raise ValueError(
            "there is no held-out helpfulness pair to calibrate the helpfulness model's scores with: collect more "
            "preferences, or raise `preferences.validation_share`"
        )
    _check_finite([*chosen, *rejected], "helpfulness")
    differences = np.asarray(chosen, dtype=np.float64) - np.asarray(rejected, dtype=np.float64)
    targets = np.full(len(differences), (len(differences) + 1) / (len(differences) + 2))
    slope = _fitted(differences, targets, has_intercept=False).slope
    if slope <= 0:
        raise ValueError(
            f"the helpfulness model scores the chosen answers of the {len(chosen)} held-out pairs no higher than the "
            "rejected ones: it can't tell them apart; train it on more preferences"
        )
    return Line(slope, -slope * float(np.mean([*chosen, *rejected])))


def choose_threshold(probabilities: Sequence[float], safe: Sequence[bool], precision: float) -> Threshold:
    """Return the largest threshold that calls answers unsafe with at least `precision`, given labels.

    Thresholds are the labelled answers' own probabilities, and 1, below which all are. If none has the precision, it is
    0: no answer is called unsafe, rather than many that are not.
    """
    order = np.argsort(probabilities, kind="stable")
    ordered = np.asarray(probabilities, dtype=np.float64)[order]
    found = np.cumsum(~np.asarray(safe, dtype=bool)[order])  # unsafe answers among the first
    called = np.arange(1, len(ordered) + 1)
    after = np.append(ordered[1:], 1.0)  # the largest threshold that calls these and no more
    possible = after > ordered  # answers of equal probability stay together
    shares = found / called
    good = np.flatnonzero(possible & (shares >= precision))
    if not len(good):
        return Threshold(0.0, None, 0.0, len(ordered), sum(not label for label in safe))
    last = good[-1]
    num_unsafe = int(found[-1])
    return Threshold(
        threshold=float(after[last]),
        precision=float(shares[last]),
        recall=float(found[last] / num_unsafe),
        labels=len(ordered),
        unsafe=num_unsafe,
    )


def _check_finite(scores: Sequence[float], model: str) -> None:
    wrong = [score for score in scores if not math.isfinite(score)]
    if wrong:
        raise ValueError(f"the {model} model scored a held-out answer {wrong[0]}: it is broken")


def _fitted(scores_N: Numbers, targets_N: Numbers, has_intercept: bool) -> Line:
    """Return the line with the least cross entropy to the targets, by Newton's method on scores scaled to unit size."""
    middle = float(scores_N.mean()) if has_intercept else 0.0
    size = float(np.sqrt(np.mean((scores_N - middle) ** 2)))
    if size == 0:
        return Line(0.0, 0.0)
    x_N2 = np.stack(((scores_N - middle) / size, np.full_like(scores_N, float(has_intercept))), axis=1)
    weights_2 = np.zeros(2)
    loss = _cross_entropy(x_N2 @ weights_2, targets_N)
    for _ in range(MAX_STEPS):
        logits_N = x_N2 @ weights_2
        predicted_N = np.exp(-np.logaddexp(0.0, -logits_N))
        gradient_2 = x_N2.T @ (predicted_N - targets_N)
        curvature_22 = (x_N2.T * (predicted_N * (1 - predicted_N))) @ x_N2
        step_2 = np.linalg.lstsq(curvature_22, gradient_2, rcond=None)[0]
        scale, after = 1.0, _cross_entropy(x_N2 @ (weights_2 - step_2), targets_N)
        while after > loss and scale > TOLERANCE:  # too far
            scale /= 2
            after = _cross_entropy(x_N2 @ (weights_2 - scale * step_2), targets_N)
        gained = loss - after
        if gained > 0:
            weights_2, loss = weights_2 - scale * step_2, after
        if gained < TOLERANCE:
            break
    slope = float(weights_2[0]) / size
    return Line(slope, float(weights_2[1]) - slope * middle)


def _cross_entropy(logits_N: Numbers, targets_N: Numbers) -> float:
    return float(np.sum(np.logaddexp(0.0, logits_N) - targets_N * logits_N))
