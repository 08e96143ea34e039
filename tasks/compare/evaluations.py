"""The evaluations that are compared: their answers, and who is compared with whom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.reading.prompts import Kind, kind_of
from tasks.running.files import read_lines
from tasks.running.places import DATA

Line = Mapping[str, Any]  # of answers.jsonl
Answers = Mapping[str, Line]  # by the prompt's id


def read_evaluations(names: Sequence[str]) -> dict[str, Answers]:
    """Return the answers of each evaluation, by prompt.

    Raises ValueError when one is missing or has no answers, and when two have answered different prompts.
    """
    evaluations: dict[str, Answers] = {}
    for name in names:
        path = DATA / "evaluate" / name / "answers.jsonl"
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: run stage `evaluate@{name}`, or take it out of `evaluate.checkpoints`"
            )
        evaluations[name] = {line["id"]: line for line in read_lines(path)}
        if not evaluations[name]:
            raise ValueError(f"{path} holds no answer: run `evaluate@{name}` again, with prompts to answer")
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


def pairs_of(baseline: str, opponents: Mapping[str, Sequence[str]], names: Sequence[str]) -> list[tuple[str, str]]:
    """Return each version with each of its opponents, the baseline first.

    Raises ValueError, naming the parameter, for one that is not among the evaluations `names`, or its own opponent.
    """
    wanted = {"baseline": [baseline], "opponents": list(opponents)}
    wanted |= {f"opponents.{version}": list(own) for version, own in opponents.items()}
    for parameter, given in wanted.items():
        for name in given:
            if name not in names:
                raise ValueError(
                    f"params.yaml: `compare.{parameter}` names {name}, which is not evaluated: add it to "
                    f"`evaluate.checkpoints`, or name one of {', '.join(names)}"
                )
    pairs = []
    for version, own in opponents.items():
        if version in (baseline, *own):
            raise ValueError(
                f"params.yaml: `compare.opponents.{version}`: {version} would be compared with itself: name other ones"
            )
        pairs += [(version, opponent) for opponent in dict.fromkeys([baseline, *own])]
    return pairs


def kind_of_line(line: Line) -> Kind:
    """Return what an answer is judged for."""
    return kind_of(line["category"], line["risk"])


def groups_of(line: Line) -> dict[str, str]:
    """Return the parts of the evaluation that an answer belongs to, by what they part; gathered prompts have their own.

    `turns`: single or multi; `gathered`: the way in which the earlier answers of a dialogue were gathered.
    """
    if line["gathered"]:
        return {"gathered": line["gathered"]}
    if kind_of_line(line) == "helpfulness":
        return {"category": line["category"], "turns": line["turns"]}
    parts = {"turns": line["turns"], "risk": line["risk"], "attack": line["attack"]}
    return {name: part for name, part in parts.items() if part}
