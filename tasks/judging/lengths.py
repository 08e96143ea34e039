"""How often one model's answers would be better than another's if both were as long (length-controlled win rate).

Y. Dubois et al., Length-Controlled AlpacaEval (2024): a logistic regression explains each prompt's preference by the
model and by the difference of lengths, and predicts at no difference. As there, the difference is divided by its
standard deviation and goes through tanh. Left out is their term for each prompt's difficulty, which is estimated from
many models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tasks.judging.intervals import student_quantile
from tasks.judging.wins import Estimate


def controlled_win_rate(points: Sequence[float], differences: Sequence[float]) -> Estimate:
    """Return the win rate at equal lengths, given each prompt's points (1, 0.5, 0) and difference of lengths.

    One win and one loss of equal lengths are added, as `wins_of` does. The interval is that of the intercept, by
    Huber's and White's sandwich, as ties make its variance smaller than the model's. The slope has scikit-learn's
    penalty, which keeps it finite where the longer answer always wins.
    """
    from scipy.special import expit  # type: ignore[import-untyped,unused-ignore]
    from sklearn.linear_model import LogisticRegression

    # Shapes: N prompts, and the two that are added; the columns of x are the intercept's and the length's.
    points_N = np.array([*points, 1.0, 0.0])
    lengths_N = np.array([*differences, 0.0, 0.0], dtype=float)
    spread = float(np.std(differences)) or 1.0
    x_N2 = np.stack([np.ones_like(lengths_N), np.tanh(lengths_N / spread)], axis=1)
    model = LogisticRegression(tol=1e-8)
    both_sides = np.repeat([1, 0], len(points_N))  # a tie is half a win and half a loss
    model.fit(np.concatenate([x_N2[:, 1:]] * 2), both_sides, np.concatenate([points_N, 1 - points_N]))
    intercept, slope = float(model.intercept_[0]), float(model.coef_[0, 0])
    predicted_N = expit(x_N2 @ [intercept, slope])
    scores_N2 = x_N2 * (points_N - predicted_N)[:, None]
    bread_22 = np.linalg.inv((x_N2 * (predicted_N * (1 - predicted_N))[:, None]).T @ x_N2 + np.diag([0, 1 / model.C]))
    error = float(np.sqrt((bread_22 @ scores_N2.T @ scores_N2 @ bread_22)[0, 0]))
    reach = student_quantile(len(points_N) - 1) * error
    low, middle, high = (float(expit(intercept + step)) for step in (-reach, 0.0, reach))
    return Estimate(len(points), middle, low, high)
