"""Prompts and pairs of responses to them: what the preference stages hand to each other."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, get_args

from model.text.dialogue import Message, check

Kind = Literal["helpfulness", "safety"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Degree = Literal["significantly", "better", "slightly", "negligibly"]  # how much better a chosen answer is
DEGREES: tuple[Degree, ...] = get_args(Degree)  # the strongest first


class Prompt(NamedTuple):
    """What is asked: a dialogue that ends with the user's turn.

    Only adversarial prompts have a `risk`, an `attack` and a `difficulty`, from 1 on.
    """

    id: str
    category: str
    messages: list[Message]
    risk: str | None
    attack: str | None
    difficulty: int | None


class Responder(TypedDict):
    """Who gave a response: the checkpoint, and the temperature it was drawn at."""

    model: str
    temperature: float


class Answer(TypedDict):
    """One response; `finished`: the model ended it by itself."""

    text: str
    finished: bool
    num_tokens: int
    responder: Responder


class ResponsePair(TypedDict):
    """Two responses to one prompt in the order in which annotators see them: left, right. `batch` names their batch."""

    id: str
    kind: Kind
    messages: list[Message]
    category: str
    risk: str | None
    attack: str | None
    responses: list[Answer]
    round: str
    batch: str


class Label(NamedTuple):
    """What one annotator says of a pair: which answer is better, how much, and which are safe, where that is asked."""

    choice: Literal[0, 1]
    degree: Degree
    safe: tuple[bool, bool] | None
    annotator: str


def is_adversarial(category: str, risk: str | None) -> bool:
    """Return whether a prompt asks for harm: it names a risk, or is of the category `safety`, as outside data say."""
    return bool(risk) or category == "safety"


def kind_of(category: str, risk: str | None) -> Kind:
    """Return what an answer to a prompt is judged for: safety if the prompt is adversarial, else helpfulness."""
    return "safety" if is_adversarial(category, risk) else "helpfulness"


def read_prompts(paths: Sequence[Path], parameter: str) -> list[Prompt]:
    """Return the prompts of all files, in their order.

    A line holds `messages` that end with the user's turn, or `turns` (MT-Bench), of which the first is asked, or
    `prompt` (IFEval). Raises ValueError, naming file and line, for a line that holds none of them or repeats an id, and
    for a file that is missing or empty; the message names `parameter` as what to correct.
    """
    prompts: dict[str, Prompt] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing: correct `{parameter}`, or run the stage that writes it")
        with path.open(encoding="utf-8") as file:
            lines = list(file)
        if not lines:
            raise ValueError(f"{path} holds no prompt: fill it, or take it out of `{parameter}`")
        for number, line in enumerate(lines, start=1):
            try:
                prompt = parse_prompt(json.loads(line), path.stem, number)
                if prompt.id in prompts:
                    raise ValueError(f"its id {prompt.id} belongs to another prompt too")
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not a prompt: {error}") from None
            prompts[prompt.id] = prompt
    return list(prompts.values())


def parse_prompt(values: Any, stem: str, number: int) -> Prompt:
    """Return the prompt in a line's JSON; a missing id or category is made from the file's name.

    Raises ValueError when it holds none.
    """
    if not isinstance(values, dict):
        raise ValueError("it holds no JSON object")
    match values:
        case {"messages": [*given]} if all(is_message(message) for message in given):
            messages = [Message(role=message["role"], content=message["content"]) for message in given]
        case {"turns": [str(text), *_]} | {"prompt": str(text)}:
            messages = [Message(role="user", content=text)]
        case _:
            raise ValueError("it needs `messages` of `role` and `content`, or `turns`, or `prompt`")
    check(messages)
    if messages[-1]["role"] != "user":
        raise ValueError("it ends with an answer: there is nothing to answer")
    difficulty = values.get("difficulty")
    return Prompt(
        id=str(values.get("id", f"{stem}-{number}")),
        category=str(values.get("category", stem)),
        messages=messages,
        risk=values.get("risk"),
        attack=values.get("attack"),
        difficulty=difficulty if isinstance(difficulty, int) else None,  # outside files say `hard`
    )


def is_message(value: object) -> bool:
    """Tell whether a JSON value is a message: an object with text in `role` and `content`."""
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def as_text(messages: Sequence[Message]) -> str:
    """Return a dialogue as readable text, one line per turn; a lone question as it is."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
