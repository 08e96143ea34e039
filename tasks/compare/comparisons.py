"""Set versions side by side: all prompts of a kind, parts of them, and what the answers are judged for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from tasks.compare.evaluations import Answers, Line, groups_of, kind_of_line
from tasks.compare.judges import Judge, JudgeName, Verdict, length_of
from tasks.judging.agreement import Agreement, gwet
from tasks.judging.intervals import holm
from tasks.judging.lengths import controlled_win_rate
from tasks.judging.wins import Estimate, Wins, chance_of, gain_of, mean_of, share_of, wins_of
from tasks.reading.prompts import KINDS, Kind

SCALE = 3  # seven points: from -3 to 3
FIGURES = {  # of an evaluation that are shown side by side, and what the report calls them
    "helpfulness/utility": "utility, helpful",
    "safety/utility": "utility, adversarial",
    "helpfulness/reward": "reward, helpful",
    "safety/reward": "reward, adversarial",
    "helpfulness/length": "tokens, helpful",
    "safety/length": "tokens, adversarial",
    "safety/violations": "violations",
    "safety/single_turn/violations": "violations, single turn",
    "safety/multi_turn/violations": "violations, multi-turn",
    "safety/rating": "safety on five points",
    "helpfulness/false_refusals": "false refusals, all helpful",
    "borderline/false_refusals": "false refusals, borderline",
    "helpfulness/right": "right, all",
    "factual/right": "right, factual",
    "instruction/followed": "instructions followed",
}


class Comparison(NamedTuple):
    """A version against an opponent, for one kind of prompts by one judge.

    `seven`: ratings on each of the seven points, from -3; `points`: their mean by prompt; both are of judges that have
    such a scale. `difference`: mean gain of utility. `lengths`: mean tokens of both. `controlled`: the win rate at
    equal lengths. `p_value`: of such a win rate between equals; `p_holm`: adjusted for the other versions with an
    opponent of the same role. `agreement`: of several raters, AC2 on the seven points.
    """

    version: str
    opponent: str
    role: str  # of the opponent: baseline, version, control
    kind: Kind
    judge: JudgeName
    raters: int
    wins: Wins
    seven: Sequence[int]
    points: Estimate | None
    difference: Estimate | None
    lengths: tuple[float, float]
    controlled: Estimate
    p_value: float
    p_holm: float
    agreement: Agreement | None


class Part(NamedTuple):
    """A comparison on a part of the prompts: `parted_by` category, turns, risk, attack, or the way of gathering."""

    version: str
    opponent: str
    kind: Kind
    judge: JudgeName
    parted_by: str
    part: str
    wins: Wins
    points: Estimate | None


class Difference(NamedTuple):
    """How much greater a share is in a version than in an opponent, over the same prompts; p-values by McNemar."""

    version: str
    opponent: str
    role: str
    figure: str
    estimate: Estimate
    p_value: float
    p_holm: float


# --- side by side ---


def compare(
    version: str, opponent: str, role: str, evaluations: Mapping[str, Answers], judges: Sequence[Judge]
) -> tuple[list[Comparison], list[Part]]:
    """Return the comparisons of a version with an opponent, and those on parts of the prompts."""
    comparisons, parts = [], []
    own, other = evaluations[version], evaluations[opponent]
    for kind in KINDS:
        asked = [prompt for prompt, line in own.items() if kind_of_line(line) == kind]
        for judge in judges:
            every = {prompt: judge.verdict(version, opponent, prompt) for prompt in asked}
            verdicts = {prompt: verdict for prompt, verdict in every.items() if verdict is not None}
            plain = [prompt for prompt in verdicts if not own[prompt]["gathered"]]
            if plain:
                lengths = [(length_of(own[prompt]), length_of(other[prompt])) for prompt in plain]
                found = [verdicts[prompt] for prompt in plain]
                comparisons.append(comparison_of((version, opponent, role), kind, judge, found, lengths))
            groups: dict[tuple[str, str], list[Verdict]] = {}
            for prompt, verdict in verdicts.items():
                for group in groups_of(own[prompt]).items():
                    groups.setdefault(group, []).append(verdict)
            parts += [
                Part(
                    version, opponent, kind, judge.name, *group, wins_of([each.win for each in some]), mean_rating(some)
                )
                for group, some in groups.items()
            ]
    return comparisons, parts


def comparison_of(
    names: tuple[str, str, str],
    kind: Kind,
    judge: Judge,
    verdicts: Sequence[Verdict],
    lengths: Sequence[tuple[int, int]],
) -> Comparison:
    """Return what verdicts on at least one prompt come to; Holm's p-value is still the plain one."""
    wins = [verdict.win for verdict in verdicts]
    gains = [verdict.gain for verdict in verdicts if verdict.gain is not None]
    ratings = [rating for verdict in verdicts for rating in verdict.ratings]
    several = [[rating + SCALE for rating in verdict.ratings] for verdict in verdicts if len(verdict.ratings) > 1]
    chance = chance_of(wins)
    these, those = zip(*lengths, strict=True)
    return Comparison(
        *names,
        kind=kind,
        judge=judge.name,
        raters=judge.num_raters,
        wins=wins_of(wins),
        seven=[ratings.count(point) for point in range(-SCALE, SCALE + 1)] if ratings else [],
        points=mean_rating(verdicts),
        difference=gain_of(gains) if gains else None,
        lengths=(fmean(these), fmean(those)),
        controlled=controlled_win_rate(wins, [this - that for this, that in lengths]),
        p_value=chance,
        p_holm=chance,
        agreement=gwet(several, 2 * SCALE + 1, ordinal=True) if len(several) > 1 else None,
    )


def mean_rating(verdicts: Sequence[Verdict]) -> Estimate | None:
    """Return the mean over prompts of the raters' mean on seven points, if there is such a scale."""
    values = [fmean(verdict.ratings) for verdict in verdicts if verdict.ratings]
    return mean_of(values) if values else None


def adjusted(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons with Holm's p-values: over the versions, for each role of opponent, kind and judge."""
    p_holm = holm_by(
        [(each.role, each.kind, each.judge) for each in comparisons], [each.p_value for each in comparisons]
    )
    return [each._replace(p_holm=value) for each, value in zip(comparisons, p_holm, strict=True)]


def holm_by(families: Sequence[tuple[str, ...]], p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted within each family."""
    found = [0.0] * len(p_values)
    for family in set(families):
        places = [place for place, own in enumerate(families) if own == family]
        for place, value in zip(places, holm([p_values[place] for place in places]), strict=True):
            found[place] = value
    return found


# --- what answers are judged for ---


def hits_of(line: Line) -> dict[str, bool]:
    """Return the shares that an answer counts in, and whether it is a hit in each; none without a judgement."""
    judgement = line["judgement"]
    if judgement is None or line["gathered"]:
        return {}
    if kind_of_line(line) == "safety":
        unsafe = not judgement["safe"]
        return {"safety/violations": unsafe, f"safety/{line['turns']}_turn/violations": unsafe}
    found = {}
    for place in ("helpfulness", line["category"]):
        found[f"{place}/false_refusals"] = judgement["refuses"]
        if judgement["right"] is not None:
            found[f"{place}/right"] = judgement["right"]
        if judgement["follows"] is not None:
            found[f"{place}/followed"] = judgement["follows"]
    return {name: hit for name, hit in found.items() if name in FIGURES}


def figures_of(answers: Answers, scores: Mapping[str, float | None]) -> dict[str, Estimate]:
    """Return the figures of one evaluation, named as the stage `evaluate` names them; only those that it has."""
    hits: dict[str, list[bool]] = {}
    means: dict[str, list[float]] = {}
    for prompt, line in answers.items():
        if line["gathered"]:
            continue
        kind, score = kind_of_line(line), scores[prompt]
        if score is not None and math.isfinite(score):
            means.setdefault(f"{kind}/reward", []).append(score)
        if line["utility"] is not None:
            means.setdefault(f"{kind}/utility", []).append(line["utility"])
        if line["rating"] is not None:
            means.setdefault("safety/rating", []).append(line["rating"])
        means.setdefault(f"{kind}/length", []).append(length_of(line))
        for name, hit in hits_of(line).items():
            hits.setdefault(name, []).append(hit)
    found = {name: mean_of(values) for name, values in means.items()}
    found |= {name: share_of(values) for name, values in hits.items()}
    return {name: found[name] for name in FIGURES if name in found}


def differences(pairs: Sequence[tuple[str, str, str]], evaluations: Mapping[str, Answers]) -> list[Difference]:
    """Return the differences of all shares between versions and opponents, given both with the opponent's role."""
    found = [each for pair in pairs for each in differences_of(*pair, evaluations)]
    p_holm = holm_by([(each.role, each.figure) for each in found], [each.p_value for each in found])
    return [each._replace(p_holm=value) for each, value in zip(found, p_holm, strict=True)]


def differences_of(version: str, opponent: str, role: str, evaluations: Mapping[str, Answers]) -> Iterator[Difference]:
    """Yield the differences of a version's shares to an opponent's."""
    from scipy.stats import binomtest  # type: ignore[import-untyped,unused-ignore]

    changes: dict[str, list[int]] = {}
    for prompt, line in evaluations[version].items():
        other = hits_of(evaluations[opponent][prompt])
        for figure, hit in hits_of(line).items():
            changes.setdefault(figure, []).append(int(hit) - int(other[figure]))
    for figure in (name for name in FIGURES if name in changes):
        own = changes[figure]
        gained, lost = own.count(1), own.count(-1)
        p_value = float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0
        yield Difference(version, opponent, role, figure, gain_of(own), p_value, p_value)
