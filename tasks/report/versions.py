"""The paper's findings about the versions and what makes them better, asked of this run's tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from tasks.judging.wins import mean_of
from tasks.reading.prompts import KINDS, Kind, kind_of
from tasks.report.charts import Chart, Series
from tasks.report.evidence import Effect, Evidence, Finding, paired
from tasks.report.outputs import NotRun, Outputs

MEASURES: Mapping[str, str] = {"helpfulness": "helpfulness", "safety": "harmlessness"}
JUDGES = {"utility": "the world's judge", "rewards": "the reward models"}


class Rate(NamedTuple):
    """A win rate with its interval; ties count as halves."""

    value: float
    low: float
    high: float


# --- what was compared ---


def roles(outputs: Outputs) -> dict[str, str]:
    """Return what each evaluation is: baseline, version, or a control."""
    return {row["evaluation"]: row["role"] for row in outputs.lines("compare", "", "versions.jsonl")}


def baseline_of(outputs: Outputs) -> str:
    """Return the evaluation that all versions are compared with."""
    return next(name for name, role in roles(outputs).items() if role == "baseline")


def versions_of(outputs: Outputs) -> list[str]:
    """Return the compared versions in order: those of params.yaml's rounds, or all if none is of a round.

    Raises NotRun if nothing is compared.
    """
    compared = [name for name, role in roles(outputs).items() if role == "version"]
    rounds = list(outputs.params.get("rounds", {}))
    found = [name for name in rounds if name in compared] or compared
    if not found:
        raise NotRun("not run: this pipeline compares no versions")
    return found


def shown_of(outputs: Outputs) -> list[str]:
    """Return the baseline and the versions, those between two rounds (such as v5_before_ppo) in their place."""
    versions = versions_of(outputs)
    others = [name for name, role in roles(outputs).items() if role == "version" and name not in versions]
    found = [baseline_of(outputs)]
    for version in versions:
        found += [other for other in others if other.startswith(f"{version}_")]
        found.append(version)
    return [*found, *(other for other in others if other not in found)]


def rates_of(outputs: Outputs, judge: str) -> dict[tuple[str, str, str], Rate]:
    """Return the win rates of one judge, by version, opponent and kind."""
    return {
        (row["version"], row["opponent"], row["kind"]): Rate(row["win_rate"], row["low"], row["high"])
        for row in outputs.lines("compare", "", "win_rates.jsonl")
        if row["judge"] == judge
    }


def judge_of(outputs: Outputs) -> str:
    """Return the judge whose word counts: the world's if there is a truth, else the reward models."""
    judges = {row["judge"] for row in outputs.lines("compare", "", "win_rates.jsonl")}
    if not judges:
        raise NotRun("not run: this pipeline compares no versions")
    return "utility" if "utility" in judges else "rewards"


def worth_of(outputs: Outputs, evaluation: str, kind: Kind) -> dict[str, float]:
    """Return what the judge says of an evaluation's answers to one kind of prompts, by prompt."""
    lines = outputs.lines("evaluate", evaluation, "answers.jsonl")
    own = {line["id"]: line["utility"] for line in lines if kind_of(line["category"], line["risk"]) == kind}
    if judge_of(outputs) == "rewards":
        scores = outputs.lines("compare", "", "scores.jsonl")
        own = {
            line["id"]: line["score"] for line in scores if line["evaluation"] == evaluation and line["kind"] == kind
        }
    return {prompt: value for prompt, value in own.items() if value is not None}


def against(outputs: Outputs, pairs: Sequence[tuple[str, str]]) -> list[Effect]:
    """Return how far the win rates of versions against opponents are from one half, for each kind."""
    judge = judge_of(outputs)
    rates = rates_of(outputs, judge)
    found = []
    for version, opponent in pairs:
        for kind in KINDS:
            if (version, opponent, kind) in rates:
                value, low, high = rates[version, opponent, kind]
                words = f"{MEASURES[kind]}, win rate of {version} against {opponent} ({value:.1%}) minus one half"
                found.append(Effect(words, value - 0.5, low - 0.5, high - 0.5, percent=True))
    return found


def controls(outputs: Outputs, suffix: str) -> list[tuple[str, str]]:
    """Return the versions with those of their opponents whose names are theirs and `suffix`, such as `_random`."""
    pairs = [(row["version"], row["opponent"]) for row in outputs.lines("compare", "", "win_rates.jsonl")]
    return [(version, other) for version, other in dict.fromkeys(pairs) if other == f"{version}_{suffix}"]


# --- findings ---


def beats_baseline(outputs: Outputs) -> Evidence:
    """Ask whether the newest version wins against the baseline on both axes."""
    versions, baseline = versions_of(outputs), baseline_of(outputs)
    rates = rates_of(outputs, judge_of(outputs))
    points = {
        version: tuple(rates[version, baseline, kind].value for kind in KINDS)
        for version in versions
        if all((version, baseline, kind) in rates for kind in KINDS)
    }
    effects = against(outputs, [(versions[-1], baseline)])
    if not effects:
        raise NotRun(f"not measured: {versions[-1]} is not compared with {baseline}")
    series = Series(
        "versions", [0.5, *(x for x, _ in points.values())], [0.5, *(y for _, y in points.values())],
        labels=[baseline, *points],
    )  # fmt: skip
    across, up = (f"{MEASURES[kind]}, win rate against {baseline}" for kind in KINDS)
    chart = Chart("Both win rates of each version", across, up, [series], percent=True)
    return Evidence(effects, chart, f"Judged by {JUDGES[judge_of(outputs)]}.")


def climb(kind: Kind) -> Callable[[Outputs], Evidence]:
    """Return a look at whether the last version is worth more than the first, prompt by prompt."""

    def look(outputs: Outputs) -> Evidence:
        versions = versions_of(outputs)
        if len(versions) < 2:
            raise NotRun(f"not run: this pipeline has one version, {versions[0]}; more rounds are needed")
        worth = {name: worth_of(outputs, name, kind) for name in [baseline_of(outputs), *versions]}
        (first, *_, last) = versions
        both = [prompt for prompt in worth[last] if prompt in worth[first]]
        words = f"{MEASURES[kind]}, worth of {last}'s answers minus {first}'s"
        effect = paired(words, [worth[last][each] for each in both], [worth[first][each] for each in both])
        found = [mean_of(list(own.values())) for own in worth.values()]
        values, lows, highs = ([getattr(each, end) for each in found] for end in ("value", "low", "high"))
        judged = "utility" if judge_of(outputs) == "utility" else "reward"
        chart = Chart(
            f"Worth of the answers, {MEASURES[kind]}", "version", judged,
            [Series(MEASURES[kind], list(worth), values, lows, highs)],
        )  # fmt: skip
        return Evidence([effect], chart, steps_of(worth))

    return look


def steps_of(worth: Mapping[str, Mapping[str, float]]) -> str:
    """Return what each version adds to the one before, in words."""
    words = []
    for before, after in zip(list(worth), list(worth)[1:], strict=False):
        both = [prompt for prompt in worth[after] if prompt in worth[before]]
        step = paired(f"{before} to {after}", [worth[after][p] for p in both], [worth[before][p] for p in both])
        words.append(str(step))
    return "Step by step: " + "; ".join(words) + "."


def last_round(outputs: Outputs) -> Evidence:
    """Compare versions with controls that learnt the last round's samples alone."""
    pairs = controls(outputs, "last_round")
    if not pairs:
        raise NotRun(
            "not run: no version has a control that learns the last round's samples alone; "
            "one named v4_last_round in `controls` and in `compare.opponents` would show it"
        )
    return compared(outputs, pairs, "Win rates against the last round's samples alone")


def choice(outputs: Outputs) -> Evidence:
    """Compare the newest version that has one with a control that learns a random sample of each prompt."""
    pairs = controls(outputs, "random")
    if not pairs:
        raise NotRun("not run: no version has a control that learns random samples (`controls` in params.yaml)")
    found = compared(outputs, pairs, "Win rates against the same training on random samples")
    return found._replace(effects=against(outputs, pairs[-1:]))


def before_ppo(outputs: Outputs) -> Evidence:
    """Compare a version that ends with PPO with its start."""
    pairs = controls(outputs, "before_ppo")
    if not pairs:
        raise NotRun("not run: no version is compared with itself before PPO")
    further = [(version, f"{version}_further") for version, _ in pairs]
    return compared(outputs, pairs, "Win rates of a version after PPO", [*pairs, *further])


def compared(
    outputs: Outputs, pairs: Sequence[tuple[str, str]], title: str, shown: Sequence[tuple[str, str]] = ()
) -> Evidence:
    """Return the win rates of pairs as effects, and those of `shown`, or of the same, as a chart."""
    rates = rates_of(outputs, judge_of(outputs))
    series = []
    for kind in KINDS:
        own = {f"{v} : {o}": rates[v, o, kind] for v, o in shown or pairs if (v, o, kind) in rates}
        ends = [list(column) for column in zip(*own.values(), strict=True)]
        if own:
            series.append(Series(MEASURES[kind], list(own), *ends))
    effects = against(outputs, pairs)
    chart = Chart(title, "version : opponent", "win rate", series, percent=True, level=0.5, joined=False)
    return Evidence(effects, chart, f"Judged by {JUDGES[judge_of(outputs)]}.")


def rescaling(outputs: Outputs) -> Evidence:
    """Ask whether tuning makes factual answers alike more than creative ones, at the highest temperature.

    The four means are taken to be independent; as both answer the same prompts, the interval is rather wide.
    """
    entries = outputs.entries("self_bleu")
    first, last = entries[0], entries[-1]
    tables = {entry: outputs.table("self_bleu", entry, "self_bleu.csv") for entry in dict.fromkeys([first, last])}
    hottest = max(tables[last]["temperature"])
    means = {
        (entry, row.kind): row
        for entry, table in tables.items()
        for row in table[table["temperature"] == hottest].itertuples()
    }
    signs = {(last, "factual"): 1, (first, "factual"): -1, (last, "creative"): -1, (first, "creative"): 1}
    if not set(signs) <= set(means):
        raise NotRun("not measured: Self-BLEU of factual and of creative prompts is needed, before and after tuning")
    value = sum(sign * means[key].self_bleu for key, sign in signs.items())
    reach = math.hypot(*((means[key].high - means[key].low) / 2 for key in signs))
    words = f"rise of Self-BLEU from {first} to {last} at temperature {hottest:g}, factual minus creative"
    series = []
    for entry, table in tables.items():
        for kind, part in table.groupby("kind", sort=False):
            curve = [part[column].tolist() for column in ("temperature", "self_bleu", "low", "high")]
            series.append(Series(f"{entry}, {kind}", *curve))
    chart = Chart("Self-BLEU against temperature: higher is more alike", "temperature", "Self-BLEU", series)
    return Evidence([Effect(words, value, value - reach, value + reach)], chart)


FINDINGS = [
    Finding(
        "last_round", "Learning the last round's samples alone makes a version forget", "section 3.2.3", "fine_tuning",
        "Versions that learnt only the last round's samples lost abilities, such as rhyming; so all rounds' are kept.",
        last_round,
    ),
    Finding(
        "choice", "The best sample teaches more than a random one", "section 3.2.3", "fine_tuning",
        "Fine-tuning on the sample that the reward model likes best improves the reward (the paper has no control).",
        choice,
    ),
    Finding(
        "ppo", "PPO improves on rejection sampling", "section 3.4.1, figure 11", "ppo",
        "The last version, with PPO on top of rejection sampling, is better than without on both axes.", before_ppo,
    ),
    Finding(
        "versions", "RLHF beats supervised fine-tuning on both axes", "section 3.4.1, figure 11", "compare",
        "From V3 on both win rates are above one half, by the reward models and by an independent judge.",
        beats_baseline,
    ),
    Finding(
        "helpfulness_climb", "Helpfulness climbs from V1 to the last version", "section 3.4.1, figure 11", "compare",
        "Each version is more helpful than the one before.", climb("helpfulness"),
    ),
    Finding(
        "harmlessness_climb", "Harmlessness climbs from V1 to the last version", "section 3.4.1, figure 11", "compare",
        "Each version is more harmless than the one before.", climb("safety"),
    ),
    Finding(
        "rescaling", "RLHF adapts the temperature to the prompt", "section 5.1, figure 21", "self_bleu",
        "Tuning makes answers to factual prompts alike even at high temperatures, but leaves creative ones diverse.",
        rescaling,
    ),
]  # fmt: skip
