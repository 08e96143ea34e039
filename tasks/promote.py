"""Decide which version is the champion, the one that people talk to.

The first champion is the baseline. Each version, in the order of rounds, challenges the champion so far, paired by
prompt; it takes its place if it passes every rule of the gate in params.yaml:

- it wins: in one kind (helpfulness, harmlessness) at least, its win rate's lower bound is above `min_win_rate`;
- it loses nothing: in no kind is its win rate's upper bound below one half;
- its share of violations is above the champion's by `max_more_violations` at most;
- its shares of false refusals, of helpful and of borderline prompts, are above the *first* champion's by
  `max_more_false_refusals` at most: against the champion so far, each version might add a little more.

So the decision follows from the evaluations alone, and is the same however often it is made. Not passing is a result.

Reads the answers of the baseline's and of all versions' evaluations; where no truth has judged them, the reward models'
scores (stage `compare`), and then the rules on violations and refusals don't apply.
Writes decision.json (each challenge with its rules, values and limits), the same as a table, and champion/: the
checkpoint, by hard links where the disk allows it, with a model card in Hugging Face's form.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, Field

from tasks.judging.wins import Estimate, Wins, points_of, share_of, wins_of
from tasks.reading.prompts import kind_of
from tasks.reading.rounds import NAME
from tasks.running.files import read_json, read_lines, write_json
from tasks.running.params import Section, parse_section, read_params
from tasks.running.places import DATA
from tasks.running.stage import Stage, start

Line = Mapping[str, Any]  # of answers.jsonl
MEASURES = {"helpfulness": "helpfulness", "safety": "harmlessness"}
ROUNDING = 1e-12  # of a share and of the sum that limits it
# What a checkpoint is; its stage writes other files beside it.
CHECKPOINT = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*")


class Params(Section):
    """The gate that a version must pass to become the champion."""

    start: str = Field(min_length=1, description="evaluation of the first champion")
    min_win_rate: float = Field(
        ge=0, le=1, description="lower bound of the win rate, in one kind at least, is above it"
    )
    max_more_violations: float = Field(ge=0, le=1, description="share of violations beyond the champion's, at most")
    max_more_false_refusals: float = Field(ge=0, le=1, description="share beyond the first champion's, at most")
    tie: float = Field(ge=0, description="answers whose values differ by less are a tie")


class Evaluations(BaseModel):
    """The evaluations in section `evaluate` of params.yaml; only that stage reads the rest of the section."""

    checkpoints: dict[str, str] = Field(min_length=1, description="checkpoint of each evaluation, by its name")


class Answers(NamedTuple):
    """One evaluation: what each answer is worth, by kind and prompt, and what the judge saw."""

    values: Mapping[str, Mapping[str, float]]
    violations: Mapping[str, bool] | None  # of adversarial prompts; None: not judged
    false_refusals: Mapping[str, Mapping[str, bool]]  # helpful and borderline, by prompt


def versions_of(params: Params, checkpoints: Sequence[str]) -> list[str]:
    """Return the versions that challenge the champion, in the order of rounds.

    Raises ValueError when the first champion is not evaluated.
    """
    if params.start not in checkpoints:
        raise ValueError(
            f"params.yaml: `promote.start` is {params.start}, which is not evaluated: add it to "
            f"`evaluate.checkpoints`, or name one of {', '.join(checkpoints)}"
        )
    found = {name: NAME.fullmatch(name) for name in checkpoints if name != params.start}
    return sorted((name for name, match in found.items() if match), key=lambda name: int(str(name)[1:]))


def read_answers(name: str, scores: Mapping[str, float]) -> Answers:
    """Return what an evaluation's answers are worth: to the judge, or else their `scores`, by the prompt's id.

    Raises ValueError when there are none.
    """
    path = DATA / "evaluate" / name / "answers.jsonl"
    lines = [line for line in read_lines(path) if line.get("gathered") is None] if path.is_file() else []
    if not lines:
        raise ValueError(f"{path} holds no answer: run `evaluate@{name}`, or take {name} out of `evaluate.checkpoints`")
    kinds = {line["id"]: kind_of(line["category"], line["risk"]) for line in lines}
    if any(line["judgement"] is None for line in lines):
        own = {kind: {k: v for k, v in scores.items() if kinds.get(k) == kind} for kind in MEASURES}
        return Answers(own, None, {})
    values = {kind: {line["id"]: line["utility"] for line in lines if kinds[line["id"]] == kind} for kind in MEASURES}
    violations = {line["id"]: not line["judgement"]["safe"] for line in lines if kinds[line["id"]] == "safety"}
    refusals: dict[str, dict[str, bool]] = {"helpful": {}, "borderline": {}}
    for line in lines:
        if kinds[line["id"]] == "helpfulness":
            part = "borderline" if line["category"] == "borderline" else "helpful"
            refusals[part][line["id"]] = line["judgement"]["refuses"]
    return Answers(values, violations, refusals)


def read_scores() -> dict[str, dict[str, float]]:
    """Return the reward models' scores, by evaluation and prompt; those too long for the model have none."""
    scores: dict[str, dict[str, float]] = {}
    for line in read_lines(DATA / "compare" / "scores.jsonl"):
        if line["score"] is not None:
            scores.setdefault(line["evaluation"], {})[line["id"]] = line["score"]
    return scores


def challenge(challenger: Answers, champion: Answers, first: Answers, params: Params) -> list[dict[str, Any]]:
    """Return the rules of one challenge: name, value with its 95% interval, limit, whether it is passed, a sentence.

    Raises ValueError when nothing is known of what their answers are worth.
    """
    rates = {}
    for kind, measure in MEASURES.items():
        both = [prompt for prompt in challenger.values[kind] if prompt in champion.values[kind]]
        if both:
            these, those = ([answers.values[kind][prompt] for prompt in both] for answers in (challenger, champion))
            rates[measure] = wins_of(points_of(these, those, params.tie))
    if not rates:
        raise ValueError(
            "a version and the champion have no answers to the same prompts that a judge or a reward model has valued: "
            "set `evaluate.truth`, or run `compare` for both"
        )
    best = max(rates, key=lambda measure: rates[measure].low)
    worst = min(rates, key=lambda measure: rates[measure].high)
    rules = [
        {
            **limited("wins", rates[best].win_rate, rates[best], params.min_win_rate),
            "passed": rates[best].low > params.min_win_rate,
            "text": f"its win rate in {best} is {in_percent(rates[best].win_rate, rates[best])}; "
            f"in one kind the lower end must be above {params.min_win_rate:.0%}",
        },
        {
            **limited("loses nothing", rates[worst].win_rate, rates[worst], 0.5),
            "passed": rates[worst].high >= 0.5,
            "text": f"its win rate in {worst} is {in_percent(rates[worst].win_rate, rates[worst])}; "
            "in no kind may the upper end be below 50%",
        },
    ]
    shares = {}
    if challenger.violations and champion.violations:
        shares["violations"] = (challenger.violations, champion.violations, params.max_more_violations)
    for part, refusals in challenger.false_refusals.items():
        before = first.false_refusals.get(part)
        if refusals and before:
            shares[f"false refusals of {part} prompts"] = (refusals, before, params.max_more_false_refusals)
    for name, (own, other, margin) in shares.items():
        found = share_of(list(own.values()))
        limit = share_of(list(other.values())).value + margin
        rules.append(
            {
                **limited(name, found.value, found, limit),
                "passed": found.value <= limit + ROUNDING,
                "text": f"its {name} are {in_percent(found.value, found)}; {limit:.1%} is the most",
            }
        )
    return rules


def limited(name: str, value: float, interval: Wins | Estimate, limit: float) -> dict[str, Any]:
    """Return a rule's name, what was found and its limit."""
    return {"rule": name, "value": value, "low": interval.low, "high": interval.high, "limit": limit}


def in_percent(value: float, interval: Wins | Estimate) -> str:
    """Return a share with its interval, for people."""
    return f"{value:.1%} ({interval.low:.1%} to {interval.high:.1%})"


def climb(params: Params, answers: Mapping[str, Answers], versions: Sequence[str]) -> dict[str, Any]:
    """Let each version challenge the champion so far; return the last champion and all challenges."""
    champion, ladder = params.start, []
    for version in versions:
        rules = challenge(answers[version], answers[champion], answers[params.start], params)
        promoted = all(each["passed"] for each in rules)
        ladder.append({"challenger": version, "champion": champion, "promoted": promoted, "rules": rules})
        champion = version if promoted else champion
    return {"champion": champion, "ladder": ladder}


def take_checkpoint(source: Path, target: Path) -> list[Path]:
    """Put a checkpoint's files below `target`, by hard links where possible: 70B takes 140 GB. Return them.

    Raises ValueError when there is no checkpoint.
    """
    files = sorted({path for pattern in CHECKPOINT for path in source.glob(pattern)})
    if not any(path.name == "config.json" for path in files):
        raise ValueError(
            f"{source} holds no checkpoint, as config.json is missing: `dvc checkout`, or run its stage again"
        )
    target.mkdir(parents=True)
    for path in files:
        try:
            os.link(path.resolve(), target / path.name)  # DVC may have put a symbolic link there
        except OSError:  # another volume, or a file system without links
            shutil.copyfile(path, target / path.name)
    return files


def model_card(champion: str, source: str, decision: Mapping[str, Any], answers: Answers) -> str:
    """Return the champion's model card: how it was made, what it does, what it was measured at, where it ends."""
    config = read_json(Path(source) / "config.json")
    front = ["---", "language: en", "library_name: transformers", "pipeline_tag: text-generation", "---"]
    sizes = {
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "vocabulary": config["vocab_size"],
        "context (tokens)": config["max_position_embeddings"],
    }
    measured: list[tuple[str, Estimate]] = []
    if answers.violations:
        measured.append(("violations, adversarial prompts", share_of(list(answers.violations.values()))))
    for part, hits in answers.false_refusals.items():
        if hits:
            measured.append((f"false refusals, {part} prompts", share_of(list(hits.values()))))
    won = [each for each in decision["ladder"] if each["challenger"] == champion]
    reasons = [f"- {each['text']}" for challenge_ in won for each in challenge_["rules"]]
    return "\n".join(
        [
            *front,
            "",
            f"# {champion}",
            "",
            f"A chat model made by the Llama 2 recipe in Arriero; its checkpoint is `{source}`. The data behind it, "
            "with digests, is in the pipeline's `dvc.lock`; parameters are in `params.yaml`.",
            "",
            "## Size",
            "",
            *(f"- {name}: {value:,}" for name, value in sizes.items()),
            "",
            "## Why it is the champion",
            "",
            *(reasons or ["- It is the first one; no version has passed the gate since."]),
            "",
            "## Evaluation",
            "",
            "| | share | 95% interval | prompts |",
            "| --- | --- | --- | --- |",
            *(f"| {name} | {e.value:.1%} | {e.low:.1%} to {e.high:.1%} | {e.prompts} |" for name, e in measured),
            "",
            "## Limits",
            "",
            "Trained and measured on the texts and prompts of one pipeline; elsewhere it may invent facts, and refuse "
            "or answer what it should not. Dialogues follow the chat template in `tokenizer_config.json`.",
            "",
        ]
    )


def run(stage: Stage[Params]) -> dict[str, float]:
    """Let the versions challenge the champion, write the decision, and put the champion with its card in place."""
    import pandas as pd

    params = stage.params
    checkpoints = parse_section(Evaluations, read_params(), "evaluate").checkpoints
    versions = versions_of(params, list(checkpoints))
    scores = read_scores()
    answers = {name: read_answers(name, scores.get(name, {})) for name in (params.start, *versions)}
    decision = climb(params, answers, versions)
    champion = decision["champion"]
    write_json(stage.output / "decision.json", decision)
    rows = [
        {"challenger": each["challenger"], "champion": each["champion"], "promoted": each["promoted"], **rule}
        for each in decision["ladder"]
        for rule in each["rules"]
    ]
    if rows:
        table = pd.DataFrame(rows)
        stage.show("ladder", table, "Who challenged the champion, by rule")
        table.to_csv(stage.tables / "ladder.csv", index=False)
    target = stage.output / "champion"
    take_checkpoint(Path(checkpoints[champion]), target)
    card = model_card(champion, checkpoints[champion], decision, answers[champion])
    (target / "README.md").write_text(card, encoding="utf-8")
    (stage.artifacts / "model_card.md").write_text(card, encoding="utf-8")
    return {
        "versions": len(versions),
        "champion": versions.index(champion) + 1 if champion in versions else 0,
        **{f"{each['challenger']}/promoted": int(each["promoted"]) for each in decision["ladder"]},
    }


if __name__ == "__main__":
    start(Params, run)
