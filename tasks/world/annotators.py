"""Simulated annotators who know the truth, with tastes of their own and errors (Llama 2, section 3.2.1).

Each gives every answer a utility: a weighted sum of what the judge says of it and of its closeness to a good answer.
The answer with the greater utility is chosen; the difference gives the degree. In safety pairs, each answer is also
labelled as safe or not, and safety comes first, as the annotator sees it. Answers to borderline prompts are labelled,
too, so that models learn to tell what looks unsafe from what is.

A label depends only on seed, annotator, prompt and the two answers, not on which of them is on the left.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from statistics import fmean
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from tasks.reading.prompts import DEGREES, Degree, Kind, Label
from tasks.running.params import Section, parse_section, read_params
from tasks.world.facts import mentions
from tasks.world.judge import Truth, judge, normalized, statements

FURTHER = 2  # annotators, beside the first, of a pair that measures agreement


class Tastes(Section):
    """What an annotator adds or deducts for a property of an answer, in units of utility."""

    right: float = Field(ge=0, description="the answer is right")
    facts: float = Field(ge=0, description="each right fact, less each wrong one")
    close: float = Field(ge=0, description="closeness to a good answer, 0 to 1: its subject and the kind of answer")
    words: float = Field(ge=0, description="share of words that exist, 0 to 1")
    well_formed: float = Field(ge=0, description="begins and ends like a text, and repeats nothing")
    follows: float = Field(ge=0, description="does what the system message asked for")
    refusal: float = Field(ge=0, description="a refusal; deducted where none is due")
    brevity: float = Field(ge=0, description="deducted for every ten words beyond a good answer's")
    harm: float = Field(ge=0, description="deducted for a method of harm or an insult, for an adversarial prompt")
    safe: float = Field(ge=0, description="seen as safe, for an adversarial prompt")


class Thresholds(Section):
    """Differences of utility at which each degree begins; below the first: negligibly better."""

    slightly: float = Field(gt=0, description="slightly better")
    better: float = Field(gt=0, description="better")
    significantly: float = Field(gt=0, description="significantly better")

    @model_validator(mode="after")
    def _rise(self) -> Thresholds:
        if not self.slightly < self.better < self.significantly:
            raise ValueError("thresholds must rise from `slightly` through `better` to `significantly`")
        return self


class Annotator(Section):
    """One simulated annotator."""

    tastes: Tastes = Field(description="what it likes")
    thresholds: Thresholds = Field(description="differences at which its degrees begin")
    noise: float = Field(ge=0, description="standard deviation of its error in seeing a utility")
    error_rate: float = Field(
        ge=0, le=1, description="share of pairs where it chooses by chance, and says it is unsure"
    )
    safety_error_rate: float = Field(ge=0, le=1, description="share of answers whose safety it misjudges")


class Annotators(Section):
    """The simulated annotators: `preferences.simulated`."""

    truth: str = Field(min_length=1, description="directory of what they know")
    overlap_share: float = Field(ge=0, le=1, description="share of pairs that three of them label, for agreement")
    annotators: dict[str, Annotator] = Field(min_length=3, description="by name")


def read_annotators() -> Mapping[str, Annotator]:
    """Return the annotators of params.yaml, by name. Raises ValueError as `parse_section` does."""
    sections = {f"preferences.{name}": value for name, value in read_params().get("preferences", {}).items()}
    return parse_section(Annotators, sections, "preferences.simulated").annotators


def annotate(truth: Truth, params: Annotators, pair: Mapping[str, Any], seed: int) -> list[Label]:
    """Return the labels of a pair of responses (tasks/reading/prompts.py: ResponsePair).

    A pair gets one label, except that a share of the pairs get three, from different annotators, to measure agreement.
    The pair's `kind` says what is asked. Raises ValueError when the truth has no such prompt.
    """
    generator = random.Random(f"{seed} annotators {pair['id']}")
    overlaps = generator.random() < params.overlap_share
    names = generator.sample(sorted(params.annotators), 1 + FURTHER)
    chosen = names if overlaps else names[:1]
    return [label(truth, name, params.annotators[name], pair, seed) for name in chosen]


def label(truth: Truth, name: str, annotator: Annotator, pair: Mapping[str, Any], seed: int) -> Label:
    """Return what one annotator says of a pair."""
    texts = [response["text"] for response in pair["responses"]]

    def chance(about: str) -> random.Random:
        return random.Random(f"{seed} {name} {pair['id']} {about}")

    views = [
        view(truth, name, annotator, pair["id"], each["text"], each["finished"], seed) for each in pair["responses"]
    ]
    seen, safe = [each.utility for each in views], [each.safe for each in views]
    is_safety, looks_unsafe = pair["kind"] == "safety", truth.prompts[pair["id"]].category == "borderline"
    labels = (safe[0], safe[1]) if is_safety or looks_unsafe else None
    # A coin picks one of the two, whichever is on the left.
    coin = texts.index(chance("coin").choice(sorted(texts)))
    if chance("error").random() < annotator.error_rate:
        return Label(side(coin), "negligibly", labels, name)
    difference = seen[0] - seen[1]
    if is_safety and safe[0] != safe[1]:
        choice = side(safe.index(True))
        return Label(choice, degree_of(difference if choice == 0 else -difference, annotator.thresholds), labels, name)
    choice = side(coin if difference == 0 else int(difference < 0))
    return Label(choice, degree_of(abs(difference), annotator.thresholds), labels, name)


class View(NamedTuple):
    """How one annotator sees an answer: what it is worth, and whether it is safe."""

    utility: float
    safe: bool


def view(truth: Truth, name: str, annotator: Annotator, prompt_id: str, answer: str, finished: bool, seed: int) -> View:
    """Return how an annotator sees an answer, errors included; the same every time, whatever it is compared with."""

    def chance(about: str) -> random.Random:
        return random.Random(f"{seed} {name} {prompt_id} {about} {answer}")

    errs = chance("safety").random() < annotator.safety_error_rate
    safe = judge(truth, prompt_id, answer, finished).safe != errs
    utility = utility_of(truth, annotator.tastes, prompt_id, answer, finished, safe)
    return View(utility + chance("utility").gauss(0, annotator.noise), safe)


def seven_points(thresholds: Thresholds, kind: Kind, this: View, that: View) -> int:
    """Return how much better one answer looks than the other: 3 much better, 0 about the same, -3 much worse.

    The degrees are those of the annotator's preferences. An answer to an adversarial prompt that alone looks safe is
    better, however little it is worth. The other order gives the opposite.
    """
    difference = this.utility - that.utility
    if kind == "safety" and this.safe != that.safe:
        sign = 1 if this.safe else -1
        return sign * max(1, _points(sign * difference, thresholds))
    return (1 if difference > 0 else -1) * _points(abs(difference), thresholds)


def _points(difference: float, thresholds: Thresholds) -> int:
    return len(DEGREES) - 1 - DEGREES.index(degree_of(difference, thresholds))


def side(number: int) -> Literal[0, 1]:
    """Return the place of an answer in its pair."""
    return 1 if number else 0


def utility_of(truth: Truth, tastes: Tastes, prompt_id: str, answer: str, finished: bool, seen_safe: bool) -> float:
    """Return what an answer is worth to an annotator. `seen_safe` counts only for adversarial prompts."""
    prompt = truth.prompts[prompt_id]
    judged = judge(truth, prompt_id, answer, finished)
    words = normalized(answer).split()
    existing = sum(word in truth.vocabulary for word in words) / len(words) if words else 0.0
    excess = max(0, judged.num_words - len(prompt.reference.split()))
    utility = (
        tastes.close * closeness(answer, prompt.reference)
        + tastes.words * existing
        + tastes.well_formed * judged.well_formed
        - tastes.brevity * excess / 10
    )
    if prompt.risk:
        harmful = mentions(normalized(answer), [*truth.methods, *truth.insults])
        return utility + tastes.safe * seen_safe + tastes.refusal * judged.refuses - tastes.harm * harmful
    is_text = prompt.check is not None and prompt.check["check"] == "facts"
    right, wrong = (judged.num_right, judged.num_wrong) if is_text else statements(truth, answer)
    return (
        utility
        + tastes.right * bool(judged.right)
        + tastes.facts * ((right if is_text else min(right, 1)) - wrong)  # nobody asked for further facts
        + tastes.follows * bool(judged.follows)
        - tastes.refusal * judged.refuses
    )


def mean_utility(
    truth: Truth, annotators: Mapping[str, Annotator], prompt_id: str, answer: str, finished: bool
) -> float:
    """Return what an answer is worth to annotators on average, none of whom errs about its safety."""
    safe = judge(truth, prompt_id, answer, finished).safe
    return fmean(utility_of(truth, each.tastes, prompt_id, answer, finished, safe) for each in annotators.values())


def closeness(answer: str, reference: str) -> float:
    """Return the harmonic mean of the shares of words that two texts have in common (F1): 1 for the same words."""
    said, good = Counter(normalized(answer).split()), Counter(normalized(reference).split())
    common = sum((said & good).values())
    return 2 * common / (sum(said.values()) + sum(good.values())) if common else 0.0


def degree_of(difference: float, thresholds: Thresholds) -> Degree:
    """Return the degree for a difference of utilities."""
    if difference >= thresholds.significantly:
        return "significantly"
    if difference >= thresholds.better:
        return "better"
    return "slightly" if difference >= thresholds.slightly else "negligibly"
