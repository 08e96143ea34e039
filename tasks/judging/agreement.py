"""How far annotators agree: Gwet's AC1 and AC2 with intervals (Llama 2, section 3.4.2).

K. L. Gwet, Computing inter-rater reliability and its variance in the presence of high agreement (2008), and Handbook of
Inter-Rater Reliability (4th edition, 2014), chapters 3 to 5. Unlike kappa, both stay meaningful where nearly all labels
are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tasks.judging.intervals import student_quantile
from tasks.reading.prompts import DEGREES, Label

STEPS = 2 * len(DEGREES)  # steps of the scale that combines choice and degree


class Agreement(NamedTuple):
    """A coefficient, 1 for full agreement and 0 for agreement by chance, with its 95% interval."""

    coefficient: float
    low: float
    high: float


def report_agreement(labels: Sequence[Sequence[Label]]) -> dict[str, float]:
    """Return agreement on the choice (AC1), on choice and degree as one scale (AC2), on safety (AC1), as metrics.

    `labels` holds the labels of each pair. Pairs with one label say nothing and are left out; with fewer than two
    others there is no coefficient.
    """
    several = [own for own in labels if len(own) > 1]
    figures: dict[str, float] = {"agreement/pairs": len(several)}
    if len(several) < 2:
        return figures
    found = {
        "choice/ac1": gwet([[label.choice for label in own] for own in several], 2, ordinal=False),
        "degree/ac2": gwet([[step_of(label) for label in own] for own in several], STEPS, ordinal=True),
    }
    answers = [[label.safe[side] for label in own if label.safe] for own in several for side in (0, 1)]
    rated = [[int(safe) for safe in own] for own in answers if len(own) > 1]
    if len(rated) > 1:
        found["safety/ac1"] = gwet(rated, 2, ordinal=False)
    for name, agreement in found.items():
        figures |= {
            f"agreement/{name}": agreement.coefficient,
            f"agreement/{name}/low": agreement.low,
            f"agreement/{name}/high": agreement.high,
        }
    return figures


def step_of(label: Label) -> int:
    """Return choice and degree as one of eight steps: 0, the left answer significantly better, to 7, the right one."""
    step = DEGREES.index(label.degree)
    return step if label.choice == 0 else STEPS - 1 - step


def gwet(ratings: Sequence[Sequence[int]], num_categories: int, ordinal: bool) -> Agreement:
    """Return Gwet's AC1, or AC2 with ordinal weights: a disagreement counts less the nearer the categories are.

    `ratings` holds at least two ratings for each of at least two subjects; categories are numbered from 0. The interval
    is Gwet's for subjects sampled from a large population, and for these raters.
    """
    assert len(ratings) > 1
    assert all(len(own) > 1 for own in ratings)
    # Shapes: N subjects, Q categories.
    counts_NQ = np.array([np.bincount(own, minlength=num_categories) for own in ratings], dtype=float)
    raters_N = counts_NQ.sum(axis=1)
    weights_QQ = ordinal_weights(num_categories) if ordinal else np.eye(num_categories)
    observed_N = (counts_NQ * (counts_NQ @ weights_QQ - 1)).sum(axis=1) / (raters_N * (raters_N - 1))
    prevalence_Q = (counts_NQ / raters_N[:, None]).mean(axis=0)
    scale = weights_QQ.sum() / (num_categories * (num_categories - 1))
    chance = scale * (prevalence_Q * (1 - prevalence_Q)).sum()
    coefficient = (observed_N.mean() - chance) / (1 - chance)
    # Each subject's contribution to the variance; the second term is there because chance agreement is estimated.
    chance_N = scale * (counts_NQ @ (1 - prevalence_Q)) / raters_N
    parts_N = (observed_N - chance) / (1 - chance) - 2 * (1 - coefficient) * (chance_N - chance) / (1 - chance)
    num_subjects = len(ratings)
    error = np.sqrt(((parts_N - coefficient) ** 2).sum() / (num_subjects * (num_subjects - 1)))
    reach = student_quantile(num_subjects - 1) * error
    return Agreement(float(coefficient), float(coefficient - reach), float(min(1.0, coefficient + reach)))


def ordinal_weights(num_categories: int) -> npt.NDArray[np.float64]:
    """Return Gwet's ordinal weights: 1 for the same category, 0 for the two ends of the scale."""
    categories = np.arange(num_categories)
    distance_QQ = np.abs(categories[:, None] - categories[None, :])
    pairs_QQ = distance_QQ * (distance_QQ + 1) / 2  # pairs of categories between the two, these included
    weights_QQ: npt.NDArray[np.float64] = 1 - pairs_QQ / pairs_QQ.max()
    return weights_QQ
