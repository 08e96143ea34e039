"""The answer, on top of the page: which version is best, whether it is promoted and why; and what versions say."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tasks.reading.prompts import KINDS
from tasks.report.charts import Chart, Series
from tasks.report.outputs import NotRun, Outputs
from tasks.report.versions import JUDGES, MEASURES, baseline_of, judge_of, rates_of, roles, shown_of, versions_of
from tasks.running.files import read_json

SHARES = {
    "safety/violations": "violations",
    "borderline/false_refusals": "false refusals of borderline prompts",
    "helpfulness/false_refusals": "false refusals of helpful prompts",
}


class Answer(NamedTuple):
    """The answer: a headline, sentences that say why, charts of all versions, their table, the ladder of promotion."""

    headline: str
    why: Sequence[str]
    charts: Sequence[Chart]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    ladder: Sequence[Mapping[str, Any]]


def answer_of(outputs: Outputs) -> Answer:
    """Return the answer, as far as the run has one; without a comparison, why it has none."""
    decision = decision_of(outputs)
    ladder = decision["ladder"] if decision else []
    try:
        shown, versions = shown_of(outputs), versions_of(outputs)
    except NotRun as missing:
        return Answer("No version is compared in this run", [f"{missing}."], [], [], [], ladder)
    charts = [chart for chart in (rates_chart(outputs, shown), shares_chart(outputs, shown)) if chart.series]
    columns, rows = table_of(outputs, shown)
    best = best_of(outputs, versions)
    headline, why = headline_of(outputs, best, decision)
    return Answer(
        headline,
        [*why, *warnings_of(outputs, decision["champion"] if decision else best)],
        charts,
        columns,
        rows,
        ladder,
    )


def decision_of(outputs: Outputs) -> dict[str, Any] | None:
    """Return what the stage `promote` decided; None if the run has no such stage."""
    try:
        decision: dict[str, Any] = read_json(outputs.place("promote") / "decision.json")
    except NotRun:
        return None
    return decision


def best_of(outputs: Outputs, versions: Sequence[str]) -> str:
    """Return the version with the highest mean of its win rates against the baseline; of equal ones the later."""
    rates, baseline = rates_of(outputs, judge_of(outputs)), baseline_of(outputs)

    def mean(version: str) -> float:
        own = [rates[version, baseline, kind].value for kind in KINDS if (version, baseline, kind) in rates]
        return sum(own) / len(own) if own else 0.0

    return max(reversed(versions), key=mean)


def headline_of(outputs: Outputs, best: str, decision: Mapping[str, Any] | None) -> tuple[str, list[str]]:
    """Return the headline, and the sentences that say why."""
    baseline, judge = baseline_of(outputs), judge_of(outputs)
    rates = rates_of(outputs, judge)
    won = " and ".join(
        f"{rate.value:.1%} ({rate.low:.1%} to {rate.high:.1%}) in {MEASURES[kind]}"
        for kind in KINDS
        if (best, baseline, kind) in rates
        for rate in [rates[best, baseline, kind]]
    )
    why = [f"{best} has the highest mean of its win rates against {baseline}: {won}, judged by {JUDGES[judge]}."]
    if decision is None:
        return f"{best} is best; nothing is promoted, as this run has no promotion stage", why
    champion, ladder = decision["champion"], decision["ladder"]
    last = ladder[-1] if ladder else None
    if last is None:
        return f"{champion} is the champion; no version has challenged it", why
    if last["promoted"]:
        headline = f"{last['challenger']} is promoted: it takes {last['champion']}'s place"
    else:
        headline = f"{last['challenger']} is not promoted: {champion} stays the champion"
    reasons = [rule["text"] for rule in last["rules"] if last["promoted"] or not rule["passed"]]
    if champion != best:
        why[0] += f" It is not the champion, {champion}, all the same: the rules of promotion ask for more than that."
    return headline, ["Why: " + "; ".join(reasons) + ".", *why] if reasons else why


def warnings_of(outputs: Outputs, name: str) -> list[str]:
    """Return what is worse in a version than in the baseline, beyond its interval."""
    rows = {row["evaluation"]: row for row in outputs.lines("compare", "", "versions.jsonl")}
    baseline = baseline_of(outputs)
    if name not in rows or name == baseline:
        return []
    these, those = rows[name], rows[baseline]
    return [
        f"At a price: {words} rise from {those[figure]:.1%} ({baseline}) to {these[figure]:.1%} ({name}; "
        f"{these[f'{figure}/low']:.1%} to {these[f'{figure}/high']:.1%})."
        for figure, words in SHARES.items()
        if figure in these and figure in those and these[f"{figure}/low"] > those[f"{figure}/high"]
    ]


def rates_chart(outputs: Outputs, shown: Sequence[str]) -> Chart:
    """Return the win rates against the baseline, by kind and judge."""
    baseline, judged = baseline_of(outputs), judge_of(outputs)
    series = []
    for judge in dict.fromkeys([judged, "rewards"]):
        rates = rates_of(outputs, judge)
        for kind in KINDS:
            own = {name: rates[name, baseline, kind] for name in shown if (name, baseline, kind) in rates}
            if own:
                ends = [list(column) for column in zip(*own.values(), strict=True)]
                series.append(Series(f"{MEASURES[kind]}, by {JUDGES[judge]}", list(own), *ends))
    title = f"Win rate against {baseline}, ties as halves"
    return Chart(title, "", "win rate", series, percent=True, level=0.5)


def shares_chart(outputs: Outputs, shown: Sequence[str]) -> Chart:
    """Return violations and false refusals of the baseline and all versions."""
    rows = {row["evaluation"]: row for row in outputs.lines("compare", "", "versions.jsonl")}
    series = []
    for figure, words in SHARES.items():
        own = [name for name in shown if rows[name].get(figure) is not None]
        if own:
            ends = ([rows[name][f"{figure}{end}"] for name in own] for end in ("", "/low", "/high"))
            series.append(Series(words, own, *ends))
    return Chart("Violations and false refusals: lower is better", "", "share of the answers", series, percent=True)


def table_of(outputs: Outputs, shown: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of all versions' figures, with their intervals."""
    rows = {row["evaluation"]: row for row in outputs.lines("compare", "", "versions.jsonl")}
    baseline = baseline_of(outputs)
    rates = rates_of(outputs, judge_of(outputs))
    figures = {
        figure: words for figure, words in SHARES.items() if any(rows[name].get(figure) is not None for name in shown)
    }
    columns = ["version", *(f"{MEASURES[kind]}, win rate" for kind in KINDS), *figures.values()]
    found = []
    for name in shown:
        cells = [name]
        for kind in KINDS:
            rate = rates.get((name, baseline, kind))
            cells.append(
                f"{rate.value:.1%}\n{rate.low:.1%}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{rate.high:.1%}"
                if rate
                else "–"
            )
        for figure in figures:
            value, low, high = (rows[name].get(f"{figure}{end}") for end in ("", "/low", "/high"))
            cells.append(
                "–" if value is None else f"{value:.1%}\n{low:.1%}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high:.1%}"
            )
        found.append(cells)
    return columns, found


# --- samples ---


class Sample(NamedTuple):
    """A prompt, and what each version says; `answers`: version, text, and what the judge says of it."""

    category: str
    messages: Sequence[Mapping[str, str]]
    answers: Sequence[tuple[str, str, Sequence[str]]]


def samples_of(outputs: Outputs, per_category: int, seed: int) -> list[Sample]:
    """Return prompts drawn by chance from each category, with the answers of all versions, or of all evaluations.

    Controls are left out where there are versions.
    """
    try:
        evaluations = outputs.entries("evaluate")
    except NotRun:
        return []
    try:
        known = roles(outputs)
        names = [name for name in shown_of(outputs) if name in known and name in evaluations]
    except NotRun:
        names = evaluations
    answers = {name: {line["id"]: line for line in outputs.lines("evaluate", name, "answers.jsonl")} for name in names}
    categories: dict[str, list[str]] = {}
    for prompt, line in answers[names[0]].items():
        if all(prompt in own for own in answers.values()):
            categories.setdefault(line["category"], []).append(prompt)
    draw = random.Random(seed)
    return [
        Sample(
            category.replace("_", " "),
            answers[names[0]][prompt]["messages"],
            [(name, own[prompt]["answer"], verdicts_of(own[prompt]["judgement"])) for name, own in answers.items()],
        )
        for category, prompts in categories.items()
        for prompt in draw.sample(prompts, min(per_category, len(prompts)))
    ]


def verdicts_of(judgement: Mapping[str, Any] | None) -> list[str]:
    """Return what the judge says of an answer, in words; nothing if it was not judged."""
    if judgement is None:
        return []
    words = [] if judgement["safe"] else ["unsafe"]
    if judgement["refuses"]:
        words.append("refuses")
    if judgement["right"] is not None:
        words.append("right" if judgement["right"] else "wrong")
    if judgement["follows"] is not None:
        words.append("keeps the instruction" if judgement["follows"] else "breaks the instruction")
    return words if judgement["well_formed"] else [*words, "malformed"]
