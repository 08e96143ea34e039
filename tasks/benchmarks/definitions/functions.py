"""What the definitions beside this file call: documents from local files, and how an answer counts."""

from __future__ import annotations

import ast
import csv
import json
import operator
import re
from functools import cache
from pathlib import Path
from typing import Any

Splits = dict[str, Any]  # of lm_eval: a `datasets.Dataset` for each split

CALL = re.compile(r"\[(calculator|search)\((.*?)\)\]")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
NEEDS_NLTK_DATA = ("length_constraints:number_sentences", "change_case:capital_word_frequency")


def truthfulqa(data_files: str, **_: object) -> Splits:
    """Return TruthfulQA's questions for MC1: the best answer first, then the false ones."""
    with Path(data_files).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return splits(
        [
            {
                "question": row["Question"],
                "group": row["Category"],
                "choices": [row["Best Answer"], *(text.strip() for text in row["Incorrect Answers"].split(";"))],
            }
            for row in rows
        ]
    )


def splits(documents: list[dict[str, Any]]) -> Splits:
    """Return documents as lm_eval takes them."""
    from datasets import Dataset

    return {"test": Dataset.from_list(documents)}


def toxigen(data_files: str, **_: object) -> Splits:
    """Return ToxiGen's sentences with their label (1 hateful) and the group that they are about."""
    found = []
    for path in sorted(Path(data_files).glob("*_*.txt")):
        kind, group = path.stem.removesuffix("_sentences").split("_", 1)
        lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
        found += [{"text": line, "label": int(kind == "hate"), "group": group} for line in lines if line]
    return splits(interleaved(found))


def bold(data_files: str, **_: object) -> Splits:
    """Return BOLD's beginnings of sentences with their domain and group."""
    found = []
    for path in sorted(Path(data_files).glob("*_prompt.json")):
        domain = path.stem.removesuffix("_prompt")
        for group, names in json.loads(path.read_text(encoding="utf-8")).items():
            prompts = [prompt.strip() for own in names.values() for prompt in own]
            found += [{"prompt": prompt, "group": f"{domain}/{group}"} for prompt in prompts]
    return splits(interleaved(found))


def interleaved(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the documents so that the first ones, which a limit keeps, hold all groups alike."""
    seen: dict[tuple[Any, Any], int] = {}
    ranks = []
    for document in documents:
        key = (document["group"], document.get("label"))
        ranks.append(seen.setdefault(key, 0))
        seen[key] += 1
    return [documents[place] for place in sorted(range(len(documents)), key=lambda place: (ranks[place], place))]


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return VADER's sentiment of a beginning and its continuation, from -1 to 1, as BOLD's authors measure it."""
    return {"sentiment": _analyzer().polarity_scores(f"{doc['prompt']} {results[0].strip()}")["compound"]}


def ifeval(data_files: str, **_: object) -> Splits:
    """Return IFEval's prompts, without those (64 of 541) whose checks need nltk's downloaded data."""
    found = []
    for line in Path(data_files).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        names = [name.removeprefix("en:") for name in row["instruction_id_list"]]
        if not set(names) & set(NEEDS_NLTK_DATA):
            found.append({**row, "instruction_id_list": names})
    return splits(found)


def follows(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    """Return whether an answer follows all instructions, by lm_eval's own checks, strictly and leniently."""
    import os
    from unittest.mock import patch

    with patch.dict(os.environ, LOCAL_RANK="1"):  # lm_eval downloads nltk's data as it is imported on rank 0
        from lm_eval.tasks.ifeval import utils
    found = utils.process_results(doc, results)
    return {name: found[f"prompt_level_{name}_acc"] for name in ("strict", "loose")}


def tool_use(data_files: str, **_: object) -> Splits:
    """Return problems with the tool that each needs and what it must be given."""
    return splits([json.loads(line) for line in Path(data_files).read_text(encoding="utf-8").splitlines()])


def calls_tool(doc: dict[str, Any], results: list[str]) -> dict[str, bool]:
    """Return whether an answer's first call parses, is of the right tool, has the right arguments and the right result.

    A calculator's arguments are right if they hold the problem's numbers, no others, and come to the answer; a search's
    if they hold the words that matter.
    """
    call = CALL.search(results[0])
    tool, argument = call.groups() if call else ("", "")
    value = calculate(argument) if tool == "calculator" else None
    parses = value is not None or (tool == "search" and bool(argument.strip()))
    if doc["tool"] == "search":
        is_right = tool == "search" and all(word.lower() in argument.lower() for word in doc["words"])
        return {"parses": parses, "right_tool": tool == "search", "right_arguments": is_right}
    numbers = sorted(map(float, re.findall(r"\d+(?:\.\d+)?", argument)))
    answers = value is not None and abs(value - doc["answer"]) < 1e-9
    return {
        "parses": parses,
        "right_tool": tool == "calculator",
        "right_arguments": answers and numbers == sorted(map(float, doc["numbers"])),
        "right_answer": answers,
    }


def calculate(expression: str) -> float | None:
    """Return the value of numbers joined by + - * / and brackets; None for anything else."""

    def value(node: ast.expr) -> float:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float) and not isinstance(node.value, bool):
            return float(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            return float(OPERATORS[type(node.op)](value(node.left), value(node.right)))
        raise ValueError

    try:
        return value(ast.parse(expression.strip(), mode="eval").body)
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, OverflowError, MemoryError):
        return None
