"""Rank the candidate answers to one prompt by both reward models' scores (Llama 2, section 3.2.3).

The paper's combination: the safety model's score counts if the prompt is tagged as one about safety, or if that model
calls the answer unsafe; else the helpfulness model's does. The numbers of two models are never compared: of one prompt,
answers that are called unsafe come after those that are not, each branch in the order of its own reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tasks.judging.calibration import Line
from tasks.reading.prompts import Kind


class Scales(NamedTuple):
    """How both models' raw scores are read, and below which probability of being safe an answer is called unsafe."""

    helpfulness: Line
    safety: Line
    threshold: float


class Reward(NamedTuple):
    """What an answer is worth: the branch whose model counts, and a number to compare within that branch."""

    branch: Kind
    value: float  # log-odds, nats, plus what the log-probability adds


def reward_of(
    kind: Kind,
    helpfulness: float,
    safety: float,
    log_probability: float,
    scales: Scales,
    weight: float,
) -> Reward:
    """Return the reward of an answer to a prompt of a kind, given both raw scores.

    `log_probability` is that of the whole answer under the model that sampled it, in nats. Its weight, 0 or more, keeps
    the choice near to what that model says: where a reward model is over-optimised, its favourites are improbable.
    """
    branch: Kind = "helpfulness"
    if kind == "safety" or scales.safety.probability(safety) < scales.threshold:
        branch = "safety"
    value = scales.safety.log_odds(safety) if branch == "safety" else scales.helpfulness.log_odds(helpfulness)
    return Reward(branch, value + weight * log_probability if weight else value)


def ranked(rewards: Sequence[Reward], eligible: Sequence[bool]) -> list[int]:
    """Return the candidates' numbers, the best first.

    Those that are not eligible come last, whatever they score; before them those of the safety branch, where the others
    are of the helpfulness branch. Of equals the first comes first.
    """

    def place(number: int) -> tuple[bool, bool, float]:
        return not eligible[number], rewards[number].branch == "safety", -rewards[number].value

    return sorted(range(len(rewards)), key=place)


def chances_of_place(num_candidates: int, num_drawn: int, place: int) -> npt.NDArray[np.float64]:
    """Return each ranked candidate's chance to have `place` (from 0, the best) among `num_drawn` of them.

    So the mean over all ways to draw, without drawing: an estimate of best-of-N that is unbiased for each N up to the
    number of candidates.
    """
    assert 0 <= place < num_drawn <= num_candidates
    ways = [
        math.comb(above, place) * math.comb(num_candidates - 1 - above, num_drawn - 1 - place)
        for above in range(num_candidates)
    ]
    return np.array([way / math.comb(num_candidates, num_drawn) for way in ways])


def chances_of_middle(num_candidates: int, num_drawn: int) -> npt.NDArray[np.float64]:
    """Return each ranked candidate's weight in the mean median of `num_drawn` of them."""
    middles = ((num_drawn - 1) // 2, num_drawn // 2)
    first, second = (chances_of_place(num_candidates, num_drawn, place) for place in middles)
    return (first + second) / 2
