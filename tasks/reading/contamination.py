"""Keep answers to evaluation prompts out of training, in demonstrations and in preferences alike.

The prompts are `evaluate.prompts` below `evaluate.root`; they are read only to leave out what asks the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import BaseModel, Field

from model.text.dialogue import Message
from tasks.reading.prompts import Prompt, read_prompts
from tasks.running.params import parse_section, read_params

REASON = "the evaluation asks the same"


class Evaluation(BaseModel):
    """The prompts in section `evaluate` of params.yaml; only the stage itself reads the rest of the section."""

    root: str = Field(min_length=1, description="directory of the prompt files, which DVC watches")
    prompts: list[str] = Field(min_length=1, description="prompt files below `root`, JSON lines")


class EvaluationPrompts(NamedTuple):
    """The prompts of evaluations, as `plain` texts."""

    dialogues: frozenset[str]
    questions: frozenset[str]  # last turns
    questions_alone: frozenset[str]  # last turns that are also the first


def evaluation_prompts(prompts: Iterable[Prompt]) -> EvaluationPrompts:
    """Return prompts in the form in which `asks_the_same` looks them up."""
    all_messages = [prompt.messages for prompt in prompts]
    questions = [_question(messages) for messages in all_messages]
    return EvaluationPrompts(
        dialogues=frozenset(map(plain, all_messages)),
        questions=frozenset(question for question, _ in questions),
        questions_alone=frozenset(question for question, alone in questions if alone),
    )


def read_evaluation() -> EvaluationPrompts:
    """Return the prompts of the evaluation that params.yaml names. Raises ValueError as `read_prompts` does."""
    evaluation = parse_section(Evaluation, read_params(), "evaluate")
    paths = [Path(evaluation.root) / name for name in evaluation.prompts]
    return evaluation_prompts(read_prompts(paths, "evaluate.prompts"))


def answers_the_same(messages: Sequence[Message], evaluation: EvaluationPrompts) -> bool:
    """Tell whether any answer of a dialogue, all of which are trained on, replies to an evaluation prompt."""
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return any(asks_the_same(messages[:place], evaluation) for place in answers)


def asks_the_same(messages: Sequence[Message], evaluation: EvaluationPrompts) -> bool:
    """Tell whether a dialogue asks the same as an evaluation prompt, ignoring case, punctuation and spacing.

    It does if all messages are the same, or if the last turns are and at least one of them stands alone. If both follow
    other messages, their meaning may depend on those: "And who is older?" after different turns is not the same
    question, nor is "Who are you?" under two system messages.
    """
    question, alone = _question(messages)
    if alone:
        return question in evaluation.questions
    return question in evaluation.questions_alone or plain(messages) in evaluation.dialogues


def plain(messages: Sequence[Message]) -> str:
    """Return the words of messages in lower case, for comparison."""
    return " | ".join(" ".join(re.findall(r"\w+", message["content"].lower())) for message in messages)


def _question(messages: Sequence[Message]) -> tuple[str, bool]:
    """Return the last turn, and whether it stands alone."""
    return plain(messages[-1:]), len(messages) == 1
