"""Who judges two answers to one prompt, and how much better each judge finds the first.

No judge here can know which answer is the left one: each values an answer by itself, and asked in both orders it says
the same. One that sees both answers at once must be asked in both orders.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median
from typing import Literal, NamedTuple

from tasks.compare.evaluations import Answers, Line, kind_of_line
from tasks.compare.scoring import Scores
from tasks.judging.wins import points_of
from tasks.world.annotators import Annotator, Thresholds, View, seven_points

JudgeName = Literal["utility", "annotators", "rewards"]
JUDGES: Mapping[JudgeName, str] = {
    "utility": "world's judge",
    "annotators": "annotators",
    "rewards": "reward model",
}


class Verdict(NamedTuple):
    """How a judge finds an answer beside another's.

    `win`: 1, a half for a tie, or 0; `ratings`: each rater's, on seven points from 3, much better, to -3, much worse;
    none where the judge has no such scale; `gain`: of utility, where the judge knows it.
    """

    win: float
    ratings: Sequence[int]
    gain: float | None


class Judge(NamedTuple):
    """A judge: `verdict` of a version's answer beside an opponent's, given both names and the prompt's id, or None."""

    name: JudgeName
    num_raters: int
    verdict: Callable[[str, str, str], Verdict | None]


def judges_of(
    evaluations: Mapping[str, Answers],
    scores: Scores,
    reward_tie: float,
    annotators: Mapping[str, Annotator] | None,
    seed: int,
) -> list[Judge]:
    """Return the judges that there are: without a truth, and so without `annotators`, the reward models alone."""
    judges = [Judge("rewards", 1, lambda *asked: verdict_of_rewards(scores, reward_tie, *asked))]
    if annotators is None:
        return judges
    known, thresholds = annotators, mean_thresholds(annotators)
    judges.insert(0, Judge("utility", 1, lambda *asked: verdict_of_utility(evaluations, thresholds, *asked)))
    lines = [line for answers in evaluations.values() for line in answers.values()]
    if all(line["raters"] for line in lines):
        num_raters = max(len(line["raters"]) for line in lines)
        judges.insert(
            1, Judge("annotators", num_raters, lambda *asked: verdict_of_annotators(evaluations, known, seed, *asked))
        )
    return judges


def mean_thresholds(annotators: Mapping[str, Annotator]) -> Thresholds:
    """Return the average annotator's thresholds."""
    fields = Thresholds.model_fields
    means = {name: fmean(getattr(each.thresholds, name) for each in annotators.values()) for name in fields}
    return Thresholds.model_validate(means)


def verdict_of_utility(
    evaluations: Mapping[str, Answers], thresholds: Thresholds, version: str, opponent: str, prompt: str
) -> Verdict:
    """Return the verdict by what answers are worth; a difference that isn't even slight is a tie."""
    this, that = evaluations[version][prompt], evaluations[opponent][prompt]
    gain = this["utility"] - that["utility"]
    views = View(this["utility"], safe=True), View(that["utility"], safe=True)  # safety is part of what one is worth
    return Verdict(
        points_of([this["utility"]], [that["utility"]], thresholds.slightly)[0],
        [seven_points(thresholds, "helpfulness", *views)],
        gain,
    )


def verdict_of_annotators(
    evaluations: Mapping[str, Answers],
    annotators: Mapping[str, Annotator],
    seed: int,
    version: str,
    opponent: str,
    prompt: str,
) -> Verdict:
    """Return the verdict of the annotators who rated both answers: the median of their seven points decides."""
    this, that = evaluations[version][prompt], evaluations[opponent][prompt]
    ratings = []
    for name in this["raters"]:
        texts = sorted([this["answer"], that["answer"]])  # the same error in either order
        if random.Random(f"{seed} {name} {prompt} side by side {texts}").random() < annotators[name].error_rate:
            ratings.append(0)
            continue
        views = [View(line["raters"][name]["utility"], line["raters"][name]["safe"]) for line in (this, that)]
        ratings.append(seven_points(annotators[name].thresholds, kind_of_line(this), *views))
    middle = median(ratings)
    return Verdict(0.5 if middle == 0 else float(middle > 0), ratings, None)


def verdict_of_rewards(scores: Scores, tie: float, version: str, opponent: str, prompt: str) -> Verdict | None:
    """Return the verdict by the reward models' scores; None where an answer was too long for the model."""
    this, that = scores[version][prompt], scores[opponent][prompt]
    if this is None or that is None:
        return None
    return Verdict(points_of([this], [that], tie)[0], [], None)


def length_of(line: Line) -> int:
    """Return an answer's length in tokens."""
    length: int = line["num_tokens"]
    return length
