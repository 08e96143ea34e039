"""Compare versions with the baseline and with their controls, paired by prompt (Llama 2, sections 3.4.1 and 3.4.2).

Each version's answers are set against each opponent's, for helpfulness (all prompts but adversarial ones) and for
harmlessness (adversarial prompts) apart, by two judges:

- utility: the world's judge, by what an answer is worth to the average annotator. A difference below that annotator's
  threshold of `slightly` is a tie. Without a truth there is no such judge.
- rewards: the reward models of one round, each on its kind of prompts. An answer that is empty or holds a tag of the
  chat format loses against any other; a prompt with an answer too long for the model is left out.

Progress that the reward models see and the truth does not is over-optimisation (Goodhart's law), so both win rates
stand side by side. They count ties as halves. Intervals are over prompts: of shares Wilson's, of win rates and of means
Student's.

Reads the answers of all evaluations that params.yaml names, and two reward models.
Writes win_rates.csv and .jsonl, versions.csv and .jsonl (all evaluations), scores.jsonl (the reward models'), plots/
and tables/.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, Field

from model.network.ranks import join_ranks
from model.scoring.reward import open_reward, score_on_ranks
from model.text.dialogue import Message, encode_dialogue
from model.text.tokenizer import Tokenizer
from tasks.judging.wins import Estimate, Wins, mean_of, share_of, wins_of
from tasks.reading.prompts import KINDS, Kind, kind_of
from tasks.running.files import read_lines, write_lines
from tasks.running.names import metric_name
from tasks.running.params import Section, parse_section, read_params
from tasks.running.places import DATA
from tasks.running.plots import Plot
from tasks.running.stage import Stage, start
from tasks.world.annotators import read_annotators

Judge = Literal["utility", "rewards"]
JUDGES: Mapping[Judge, str] = {"utility": "world's judge", "rewards": "reward model"}
MEASURES: Mapping[Kind, str] = {"helpfulness": "helpfulness", "safety": "harmlessness"}
TITLES = {  # figures of an evaluation that the report shows side by side
    "helpfulness/utility": "utility, helpful",
    "safety/utility": "utility, adversarial",
    "helpfulness/reward": "reward, helpful",
    "safety/reward": "reward, adversarial",
    "safety/violations": "violations",
    "helpfulness/false_refusals": "false refusals, all helpful",
    "borderline/false_refusals": "false refusals, borderline",
    "helpfulness/right": "right, all",
    "factual/right": "right, factual",
    "instruction/followed": "instructions followed",
}
Line = Mapping[str, Any]  # of answers.jsonl
Answers = Mapping[str, Line]  # by the prompt's id


class Params(Section):
    """Which versions are compared with what, and by which reward models."""

    baseline: str = Field(min_length=1, description="evaluation that every version is compared with")
    opponents: dict[str, list[str]] = Field(description="evaluations that each version is compared with, too")
    rewards: str = Field(min_length=1, description="round of the two reward models that judge")
    reward_tie: float = Field(ge=0, description="scores that differ by less are a tie; 0: equal scores alone")
    precision: Literal["fp32", "bf16"] = Field(description="weights and products")
    tokens_at_once: int = Field(gt=0, description="tokens scored at once; more take more memory")


class Evaluations(BaseModel):
    """The evaluations in section `evaluate` of params.yaml; only that stage reads the rest of the section."""

    checkpoints: dict[str, str] = Field(min_length=1, description="checkpoint of each evaluation, by its name")


class Judged(NamedTuple):
    """What a judge says of every evaluation's answers, by prompt; None: it can't say. `tie`: least difference."""

    judge: Judge
    values: Mapping[str, Mapping[str, float | None]]
    tie: float


class Comparison(NamedTuple):
    """A version against an opponent, for one kind of prompts by one judge; `difference`: mean gain of utility."""

    version: str
    opponent: str
    kind: Kind
    judge: Judge
    wins: Wins
    difference: Estimate | None


def run(stage: Stage[Params]) -> dict[str, float]:
    """Read all answers, score them, compare, report."""
    params = stage.params
    evaluations = read_evaluations(list(parse_section(Evaluations, read_params(), "evaluate").checkpoints))
    pairs = pairs_of(params, list(evaluations))
    scores = score_evaluations(params, evaluations, join_ranks())
    judges = [Judged("rewards", scores, params.reward_tie)]
    utilities = {
        name: {prompt: line["utility"] for prompt, line in answers.items()} for name, answers in evaluations.items()
    }
    if all(value is not None for own in utilities.values() for value in own.values()):
        tie = fmean(each.thresholds.slightly for each in read_annotators().values())
        judges.insert(0, Judged("utility", utilities, tie))
    kinds = {prompt: kind_of(line["category"], line["risk"]) for prompt, line in evaluations[params.baseline].items()}
    comparisons = [found for version, opponent in pairs for found in compare(version, opponent, kinds, judges)]
    versions = {name: figures_of(answers, scores[name]) for name, answers in evaluations.items()}
    if stage.rank == 0:
        write_comparisons(stage, comparisons)
        write_versions(stage, versions)
        write_scores(stage, evaluations, scores)
    too_long = [value for own in scores.values() for value in own.values() if value is None]
    return {
        "evaluations": len(evaluations),
        "comparisons": len(pairs),
        "answers_too_long": len(too_long),
        **comparison_figures(params, comparisons),
        **{
            f"{metric_name(name)}/{figure}": estimate.value
            for name, figures in versions.items()
            for figure, estimate in figures.items()
        },
    }


# --- which answers ---


def read_evaluations(names: Sequence[str]) -> dict[str, Answers]:
    """Return the answers of each evaluation, by prompt.

    Raises ValueError when one is missing, and when two have answered different prompts.
    """
    evaluations: dict[str, Answers] = {}
    for name in names:
        path = DATA / "evaluate" / name / "answers.jsonl"
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: run stage `evaluate@{name}`, or take it out of `evaluate.checkpoints`"
            )
        evaluations[name] = {line["id"]: line for line in read_lines(path)}
        first = evaluations[names[0]]
        asked, other = (
            {prompt: line["messages"] for prompt, line in each.items()} for each in (evaluations[name], first)
        )
        different = [prompt for prompt in {**asked, **other} if asked.get(prompt) != other.get(prompt)]
        if different:
            raise ValueError(
                f"{path} and the evaluation of {names[0]} differ in {len(different)} prompts, such as {different[0]}: "
                f"run `evaluate@{name}` and `evaluate@{names[0]}` with the same prompts"
            )
    return evaluations


def pairs_of(params: Params, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return each version with each of its opponents, the baseline first.

    Raises ValueError, naming the parameter, for one that is not among the evaluations `names`, or its own opponent.
    """
    wanted = {"baseline": [params.baseline], "opponents": list(params.opponents)}
    wanted |= {f"opponents.{version}": opponents for version, opponents in params.opponents.items()}
    for parameter, own in wanted.items():
        for name in own:
            if name not in names:
                raise ValueError(
                    f"params.yaml: `compare.{parameter}` names {name}, which is not evaluated: add it to "
                    f"`evaluate.checkpoints`, or name one of {', '.join(names)}"
                )
    pairs = []
    for version, opponents in params.opponents.items():
        if version in (params.baseline, *opponents):
            raise ValueError(
                f"params.yaml: `compare.opponents.{version}`: {version} would be compared with itself: name other ones"
            )
        pairs += [(version, opponent) for opponent in dict.fromkeys([params.baseline, *opponents])]
    return pairs


# --- the reward models' judgement ---


def score_evaluations(
    params: Params, evaluations: Mapping[str, Answers], device: torch.device
) -> dict[str, dict[str, float | None]]:
    """Return the score of every answer, by evaluation and prompt, from the reward model of the prompt's kind.

    None: the dialogue is longer than the model's context. The same answer to a prompt is scored once. Raises ValueError
    as `model.network.checkpoint` does, and for a score that is not a number.
    """
    found: dict[tuple[str, str], float | None] = {}
    for kind in KINDS:
        own = {
            (prompt, line["answer"]): line
            for answers in evaluations.values()
            for prompt, line in answers.items()
            if kind_of(line["category"], line["risk"]) == kind
        }
        if own:
            found |= score_lines(params, DATA / f"reward_{kind}" / params.rewards, own, device)
    return {
        name: {prompt: found[prompt, line["answer"]] for prompt, line in answers.items()}
        for name, answers in evaluations.items()
    }


def score_lines(
    params: Params, checkpoint: Path, lines: Mapping[tuple[str, str], Line], device: torch.device
) -> dict[tuple[str, str], float | None]:
    """Return one reward model's score of each line's answer; the ranks share the work, and each gets all scores."""
    model, tokenizer = open_reward(checkpoint, params.precision, device)
    dialogues = {key: ids_of(line, tokenizer) for key, line in lines.items()}
    context = model.config.max_position_embeddings
    fitting = {key: ids for key, ids in dialogues.items() if ids and len(ids) <= context}
    scores = dict(zip(fitting, score_on_ranks(model, list(fitting.values()), params.tokens_at_once), strict=True))
    for (prompt, _), value in scores.items():
        if not math.isfinite(value):
            raise ValueError(f"{checkpoint} scores an answer to prompt {prompt} as {value}: the reward model is broken")
    return {key: scores.get(key) if ids else -math.inf for key, ids in dialogues.items()}


def ids_of(line: Line, tokenizer: Tokenizer) -> list[int]:
    """Return the ids of a prompt with its answer; none if that can't be encoded, as it is empty or has a tag."""
    try:
        return encode_dialogue([*line["messages"], Message(role="assistant", content=line["answer"])], tokenizer).ids
    except ValueError:
        return []


# --- comparisons ---


def compare(version: str, opponent: str, kinds: Mapping[str, Kind], judges: Sequence[Judged]) -> Iterator[Comparison]:
    """Yield the comparisons of a version with an opponent; `kinds` holds each prompt's."""
    for kind in KINDS:
        for judge, values, tie in judges:
            own = [(values[version][prompt], values[opponent][prompt]) for prompt in kinds if kinds[prompt] == kind]
            both = [(this, that) for this, that in own if this is not None and that is not None]
            if both:
                wins = wins_of([this for this, _ in both], [that for _, that in both], tie)
                gain = mean_of([this - that for this, that in both]) if judge == "utility" else None
                yield Comparison(version, opponent, kind, judge, wins, gain)


def comparison_figures(params: Params, comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Return win rates and differences as metrics; `newest/` repeats the last version's against the baseline.

    They are under `<version>/against/<opponent>/<kind>`, those by the reward models one level below, in `rewards`.
    """
    figures: dict[str, float] = {}
    newest = next(reversed(params.opponents), None)
    for found in comparisons:
        judge = "" if found.judge == "utility" else f"/{found.judge}"
        places = [f"{metric_name(found.version, 'against', found.opponent)}/{found.kind}{judge}"]
        if (found.version, found.opponent) == (newest, params.baseline):
            places.append(f"newest/{found.kind}{judge}")
        for place in places:
            figures |= {
                f"{place}/win_rate": found.wins.win_rate,
                f"{place}/win_rate/low": found.wins.low,
                f"{place}/win_rate/high": found.wins.high,
            }
            if found.difference is not None:
                figures[f"{place}/utility_difference"] = found.difference.value
    return figures


def figures_of(answers: Answers, scores: Mapping[str, float | None]) -> dict[str, Estimate]:
    """Return the figures of one evaluation, named as the stage `evaluate` names them; only those that it has."""
    hits: dict[str, list[bool]] = {}
    means: dict[str, list[float]] = {}
    for prompt, line in answers.items():
        kind, category, judgement = kind_of(line["category"], line["risk"]), line["category"], line["judgement"]
        score = scores[prompt]
        if score is not None and math.isfinite(score):
            means.setdefault(f"{kind}/reward", []).append(score)
        if line["utility"] is not None:
            means.setdefault(f"{kind}/utility", []).append(line["utility"])
        if judgement is None:
            continue
        if kind == "safety":
            hits.setdefault("safety/violations", []).append(not judgement["safe"])
            continue
        for place in ("helpfulness", category):
            hits.setdefault(f"{place}/false_refusals", []).append(judgement["refuses"])
            if judgement["right"] is not None:
                hits.setdefault(f"{place}/right", []).append(judgement["right"])
            if judgement["follows"] is not None:
                hits.setdefault(f"{place}/followed", []).append(judgement["follows"])
    found = {name: mean_of(values) for name, values in means.items()}
    found |= {name: share_of(values) for name, values in hits.items()}
    return {name: found[name] for name in TITLES if name in found}


# --- files ---


def write_comparisons(stage: Stage[Params], comparisons: Sequence[Comparison]) -> None:
    """Write the win rates: one row a comparison; plots; and a table in words, one row a version and opponent."""
    import pandas

    rows = [flat(found) for found in comparisons]
    write_lines(stage.output / "win_rates.jsonl", rows)
    columns = ["version", "opponent", "kind", "judge", *Wins._fields, "difference", "difference_low", "difference_high"]
    table = pandas.DataFrame(rows, columns=columns)
    for directory in (stage.output, stage.tables):
        table.to_csv(directory / "win_rates.csv", index=False)
    if not comparisons:
        return
    baseline = stage.params.baseline
    progress = [
        {"version": found.version, "series": words_of(found.kind, found.judge), "win_rate": found.wins.win_rate}
        for found in comparisons
        if found.opponent == baseline
    ]
    start = [
        {"version": baseline, "series": name, "win_rate": 0.5} for name in {row["series"]: None for row in progress}
    ]
    title = f"Win rate against {baseline}, by version and judge"
    stage.plot(
        "progress",
        pandas.DataFrame([*start, *progress]),
        Plot("steps", title, "version", "win_rate", "version", "win rate, ties as halves", "series"),
    )
    for judge in [judge for judge in JUDGES if any(found.judge == judge for found in comparisons)]:
        bars = [
            {"pair": f"{row['version']} against {row['opponent']}: {MEASURES[row['kind']]}", **row}
            for row in rows
            if row["judge"] == judge
        ]
        title = f"Versions against the baseline and their controls, by the {JUDGES[judge]}"
        plot = Plot("bars", title, "win_rate", "pair", "win rate, ties as halves", "version and opponent")
        stage.plot(f"controls_by_{judge}", pandas.DataFrame(bars), plot)
    title = "Versions against the baseline and their controls: win rates with 95% intervals, ties as halves"
    stage.show("against", pandas.DataFrame(pairs_in_words(comparisons)), title)


def pairs_in_words(comparisons: Sequence[Comparison]) -> list[dict[str, str]]:
    """Return a row for each version and opponent: the win rates by kind and judge, then the gains of utility."""
    rates: dict[tuple[str, str], dict[str, str]] = {}
    gains: dict[tuple[str, str], dict[str, str]] = {}
    for found in comparisons:
        pair, wins = (found.version, found.opponent), found.wins
        row = rates.setdefault(pair, {"version": found.version, "against": found.opponent})
        row[words_of(found.kind, found.judge)] = in_words(
            Estimate(wins.prompts, wins.win_rate, wins.low, wins.high), "{:.1%}"
        )
        if found.difference is not None:
            gains.setdefault(pair, {})[f"gain of utility, {MEASURES[found.kind]}"] = in_words(
                found.difference, "{:+.2f}"
            )
    return [row | gains.get(pair, {}) for pair, row in rates.items()]


def write_versions(stage: Stage[Params], versions: Mapping[str, Mapping[str, Estimate]]) -> None:
    """Write the figures of all evaluations side by side: one row an evaluation; and a table in words."""
    import pandas

    rows: list[dict[str, Any]] = []
    words: list[dict[str, str]] = []
    for name, figures in versions.items():
        rows.append({"evaluation": name, "role": role_of(name, stage.params)})
        words.append(dict(rows[-1]))
        for figure, found in figures.items():
            rows[-1] |= {figure: found.value, f"{figure}/low": found.low, f"{figure}/high": found.high}
            is_share = not figure.endswith(("utility", "reward"))
            words[-1][TITLES[figure]] = in_words(found, "{:.1%}" if is_share else "{:.2f}")
    write_lines(stage.output / "versions.jsonl", rows)
    for directory in (stage.output, stage.tables):
        pandas.DataFrame(rows).to_csv(directory / "versions.csv", index=False)
    stage.show("evaluations", pandas.DataFrame(words).fillna(""), "All evaluations side by side, with 95% intervals")


def write_scores(
    stage: Stage[Params],
    evaluations: Mapping[str, Answers],
    scores: Mapping[str, Mapping[str, float | None]],
) -> None:
    """Write the reward models' scores, one line an answer; null: too long, or nothing that can be scored."""
    rows = [
        {
            "evaluation": name,
            "id": prompt,
            "kind": kind_of(line["category"], line["risk"]),
            "score": score if (score := scores[name][prompt]) is not None and math.isfinite(score) else None,
        }
        for name, answers in evaluations.items()
        for prompt, line in answers.items()
    ]
    write_lines(stage.output / "scores.jsonl", rows)


def flat(found: Comparison) -> dict[str, Any]:
    """Return a comparison as a row."""
    row = {"version": found.version, "opponent": found.opponent, "kind": found.kind, "judge": found.judge}
    gain: dict[str, float | None] = dict.fromkeys(("difference", "difference_low", "difference_high"))
    if found.difference is not None:
        _, *values = found.difference
        gain = dict(zip(gain, values, strict=True))
    return {**row, **found.wins._asdict(), **gain}


def words_of(kind: Kind, judge: Judge) -> str:
    """Return what is compared, and by whom, for people."""
    return f"{MEASURES[kind]}, {JUDGES[judge]}"


def role_of(name: str, params: Params) -> str:
    """Return what an evaluation is to the comparison."""
    if name == params.baseline:
        return "baseline"
    if name in params.opponents:
        return "version"
    versions = [version for version, opponents in params.opponents.items() if name in opponents]
    return f"control of {', '.join(versions)}" if versions else "other"


def in_words(found: Estimate, pattern: str) -> str:
    """Return an estimate for people, its interval on a second line."""
    if found.low is None or found.high is None:
        return pattern.format(found.value)
    return f"{pattern.format(found.value)}\n{pattern.format(found.low)} to {pattern.format(found.high)}"


if __name__ == "__main__":
    start(Params, run)
