"""What the reward models say of every answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from model.scoring.reward import open_reward, score_on_ranks
from model.text.dialogue import Message, encode_dialogue
from model.text.tokenizer import Tokenizer
from tasks.compare.evaluations import Answers, Line, kind_of_line
from tasks.reading.prompts import KINDS
from tasks.running.files import write_lines
from tasks.running.places import DATA

Scores = Mapping[str, Mapping[str, float | None]]  # by evaluation and prompt


def score_evaluations(
    rewards: str,
    evaluations: Mapping[str, Answers],
    precision: Literal["fp32", "bf16"],
    tokens_at_once: int,
    device: torch.device,
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
            if kind_of_line(line) == kind
        }
        if own:
            found |= score_lines(DATA / f"reward_{kind}" / rewards, own, precision, tokens_at_once, device)
    return {
        name: {prompt: found[prompt, line["answer"]] for prompt, line in answers.items()}
        for name, answers in evaluations.items()
    }


def score_lines(
    checkpoint: Path,
    lines: Mapping[tuple[str, str], Line],
    precision: Literal["fp32", "bf16"],
    tokens_at_once: int,
    device: torch.device,
) -> dict[tuple[str, str], float | None]:
    """Return one reward model's score of each line's answer; the ranks share the work, and each gets all scores."""
    model, tokenizer = open_reward(checkpoint, precision, device)
    dialogues = {key: ids_of(line, tokenizer) for key, line in lines.items()}
    context = model.config.max_position_embeddings
    fitting = {key: ids for key, ids in dialogues.items() if ids and len(ids) <= context}
    scores = dict(zip(fitting, score_on_ranks(model, list(fitting.values()), tokens_at_once), strict=True))
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


def write_scores(path: Path, evaluations: Mapping[str, Answers], scores: Scores) -> None:
    """Write the reward models' scores, one line an answer; null: too long, or nothing that can be scored."""
    rows = [
        {
            "evaluation": name,
            "id": prompt,
            "kind": kind_of_line(line),
            "score": score if (score := scores[name][prompt]) is not None and math.isfinite(score) else None,
        }
        for name, answers in evaluations.items()
        for prompt, line in answers.items()
    ]
    write_lines(path, rows)
