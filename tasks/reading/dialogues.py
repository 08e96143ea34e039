"""Reading dialogues from outside files: this project's own lines, OpenAssistant's trees, pairs, GSM8K.

Files are JSON lines or one JSON array (.json), plain, .gz or .zst, by globs below a root directory that DVC watches or
by http(s) URLs. A source's `format` says how to read its rows; `auto` infers it from the columns of a file's first row:

- messages: `messages` as in model/text/dialogue.py, with `id`, `category` and `safety` where given.
- openassistant: trees of messages, one message per row, with `parent_id`, `role`, `text` and `rank`. Each tree gives
  its best path: at each message the best-ranked reply (unranked ones last, ties in file order), up to the last answer.
  User messages without an answer and deleted messages are ignored.
- pairs: `prompt` and `response`, or `instruction`, with `input` or `context` below it where there is one, and `output`
  or `response`, or the first of `instances`. Alpaca's prompt template around an instruction is removed, as this
  project's dialogues have their own.
- gsm8k: `question` and `answer`. Calculator annotations (<<1+1=2>>) are removed, the last line (#### 2) stays.

A row that is not a dialogue (`model.text.dialogue.check`) is set aside with the reason; too many stop the stage.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, TypedDict

from pydantic import Field, model_validator

from model.text.dialogue import Loss, Message, check
from tasks.reading import sources
from tasks.reading.sources import File, Malformed, Object
from tasks.running.digests import fraction_of, number_of
from tasks.running.params import Section

Format = Literal["auto", "messages", "openassistant", "pairs", "gsm8k"]
FRAME = re.compile(
    r"\s*Below is an instruction.*?### Instruction:\n(?P<instruction>.*?)(\n\s*### Input:\n(?P<input>.*?))?"
    r"\n\s*### Response:\s*",
    re.DOTALL,
)
CALCULATION = re.compile(r"<<.*?>>")
ROLES: Mapping[str, Literal["user", "assistant"]] = {"prompter": "user", "assistant": "assistant"}


class Use(Section):
    """What is learnt from a source of dialogues, and how often."""

    max_dialogues: int | None = Field(gt=0, description="dialogues taken from it; null: all")
    validation_share: float = Field(ge=0, le=1, description="share of its prompts that is held out")
    weight: float = Field(ge=0, description="relative share of the dialogues that are learnt; 0: none of its")
    loss: Loss = Field(description="which answers of a dialogue are learnt: all, or the last only")

    @model_validator(mode="after")
    def _has_what_it_draws(self) -> Self:
        if self.validation_share == 1 and self.weight > 0:
            raise ValueError("a source for validation only (validation_share 1) has weight 0: nothing of it is learnt")
        return self


class DialogueFiles(Section):
    """Files of dialogues."""

    files: list[str] = Field(min_length=1, description="globs below the root, or http(s) URLs")
    format: Format = Field(description="format of its rows; auto: inferred from their columns")


class DialogueSource(DialogueFiles, Use):
    """One source of dialogues to learn."""


class Dialogue(TypedDict):
    """One dialogue that ends with an answer."""

    id: str
    messages: list[Message]
    category: str
    safety: bool
    source: str


class Refused(TypedDict):
    """A row that gave no dialogue."""

    source: str
    file: str
    row: int
    error: str
    raw: str


def read_dialogues(
    root: Path, named_sources: Mapping[str, DialogueFiles], section: str, max_malformed_share: float
) -> tuple[list[Dialogue], list[Refused]]:
    """Return the dialogues of all sources, in the sources' order, and the rows that gave none.

    Raises ValueError for files that can't be found or read, for rows whose format can't be inferred, and for a source
    whose malformed rows exceed `max_malformed_share` of its dialogues and malformed rows together.
    """
    dialogues: list[Dialogue] = []
    all_refused: list[Refused] = []
    as_files = {
        name: sources.Source(files=source.files, format="jsonl", text_field="")
        for name, source in named_sources.items()
    }
    found: dict[str, list[Dialogue]] = {name: [] for name in named_sources}
    refused: dict[str, list[Refused]] = {name: [] for name in named_sources}
    for file in sources.find_files(root, as_files, section):
        for item in _read(file, named_sources[file.source].format, section):
            if isinstance(item, Malformed):
                refused[file.source].append({"source": file.source, **item._asdict()})  # type: ignore[typeddict-item]
            else:
                found[file.source].append(item)
    for name in named_sources:
        total = len(found[name]) + len(refused[name])
        if len(refused[name]) > max_malformed_share * total:
            first = refused[name][0]
            raise ValueError(
                f"source `{name}`: {len(refused[name])} of {total} dialogues are malformed, more than "
                f"`{section}.max_malformed_share` {max_malformed_share}; the first is row {first['row']} of "
                f"{first['file']}: {first['error']}. Fix the source, or raise the share"
            )
        dialogues += found[name]
        all_refused += refused[name]
    return dialogues, all_refused


def split_dialogues(
    dialogues: Iterable[Dialogue], named_sources: Mapping[str, DialogueSource], seed: int
) -> tuple[list[Dialogue], list[Dialogue]]:
    """Return the dialogues to train on and those held out, at most `max_dialogues` of each source, in their order.

    A hash of seed and first user message decides: dialogues that open with the same words are on the same side.
    """
    by_source: dict[str, list[Dialogue]] = defaultdict(list)
    for dialogue in dialogues:
        by_source[dialogue["source"]].append(dialogue)
    train: list[Dialogue] = []
    held_out: list[Dialogue] = []
    for name, source in named_sources.items():
        own = by_source[name]
        drawn = sorted(range(len(own)), key=lambda number: number_of(f"{seed} use {number} {own[number]['id']}"))
        for number in sorted(drawn[: source.max_dialogues]):
            opening = next(message["content"] for message in own[number]["messages"] if message["role"] == "user")
            is_held_out = fraction_of(f"{seed} hold out {opening}") < source.validation_share
            (held_out if is_held_out else train).append(own[number])
    return train, held_out


def _read(file: File, named_format: Format, section: str) -> Iterator[Dialogue | Malformed]:
    """Stream one file's dialogues."""
    items = sources.read_objects(file)
    before: list[Malformed] = []
    for first in items:
        if isinstance(first, Object):
            break
        before.append(first)
    else:
        yield from before
        return
    yield from before
    found = named_format if named_format != "auto" else _format_of(first, file, section)
    yield from (_trees if found == "openassistant" else _each(_MESSAGES[found]))(file, _from(first, items))


def _from(first: Object, items: Iterator[Object | Malformed]) -> Iterator[Object | Malformed]:
    yield first
    yield from items


def _format_of(first: Object, file: File, section: str) -> Format:
    columns = first.values.keys()
    if "messages" in columns:
        return "messages"
    if {"parent_id", "role", "text"} <= columns:
        return "openassistant"
    if {"question", "answer"} <= columns:
        return "gsm8k"
    if {"prompt", "response"} <= columns or "instruction" in columns:
        return "pairs"
    raise ValueError(
        f"{file.location}: its format can't be inferred from its columns ({', '.join(columns)}): set "
        f"`{section}.sources.{file.source}.format`, or convert it to the form `messages`"
    )


def _dialogue(file: File, first: Object, messages: list[Message]) -> Dialogue | Malformed:
    """Return a dialogue with its first row's fields, or a malformed row unless it ends with an answer."""
    values = first.values
    try:
        check(messages)
        if messages[-1]["role"] != "assistant":
            raise ValueError("it ends with the user's turn: there is no answer to learn from")
    except ValueError as error:
        return _malformed(first, str(error))
    category = values.get("category")
    return Dialogue(
        id=str(values.get("id", values.get("message_id", f"{file.name}:{first.row}"))),
        messages=messages,
        category=category if isinstance(category, str) and category else file.source,
        safety=values.get("safety") is True,
        source=file.source,
    )


def _malformed(item: Object, error: str) -> Malformed:
    return Malformed(item.file, item.row, error, item.raw.decode("utf-8").rstrip("\r\n"))


Reader = Callable[[File, Iterator[Object | Malformed]], Iterator[Dialogue | Malformed]]


def _each(messages_of: Callable[[dict[str, Any]], list[Message]]) -> Reader:
    """Return a reader of files whose rows are dialogues."""

    def reader(file: File, items: Iterator[Object | Malformed]) -> Iterator[Dialogue | Malformed]:
        for item in items:
            if isinstance(item, Malformed):
                yield item
                continue
            try:
                messages = messages_of(item.values)
            except ValueError as error:
                yield _malformed(item, str(error))
            else:
                yield _dialogue(file, item, messages)

    return reader


def _text(values: Mapping[str, Any], *columns: str) -> str:
    """Return the text of the first of these columns that exists."""
    column = next((column for column in columns if column in values), None)
    if column is None:
        raise ValueError(f"it has no `{'` or `'.join(columns)}`")
    text = values[column]
    if not isinstance(text, str):
        raise ValueError(f"`{column}` is {type(text).__name__}, not text")
    return text


def _own(values: dict[str, Any]) -> list[Message]:
    messages = values.get("messages")
    if not (isinstance(messages, list) and all(isinstance(message, dict) for message in messages)):
        raise ValueError("`messages` is not a list of objects")
    for message in messages:
        if message.get("role") not in ("system", "user", "assistant"):
            raise ValueError(f"role {message.get('role')!r} is none of system, user and assistant")
    return [Message(role=message["role"], content=_text(message, "content")) for message in messages]


def _turns(question: str, answer: str) -> list[Message]:
    if not question.strip():
        raise ValueError("the prompt is empty")
    return [Message(role="user", content=question.strip()), Message(role="assistant", content=answer.strip())]


def _pair(values: dict[str, Any]) -> list[Message]:
    instances = values.get("instances")
    if isinstance(instances, list) and instances and isinstance(instances[0], dict):
        values = {"instruction": values.get("instruction"), **instances[0]}
    question, answer = _text(values, "prompt", "instruction"), _text(values, "response", "output")
    below = next((values[column] for column in ("input", "context") if values.get(column)), "")
    framed = FRAME.fullmatch(question)
    if framed:
        question, below = framed["instruction"], framed["input"] or below
    if not isinstance(below, str):
        raise ValueError(f"`input` or `context` is {type(below).__name__}, not text")
    return _turns(f"{question.strip()}\n\n{below.strip()}", answer)


def _grade_school(values: dict[str, Any]) -> list[Message]:
    return _turns(_text(values, "question"), CALCULATION.sub("", _text(values, "answer")))


_MESSAGES: Mapping[Format, Callable[[dict[str, Any]], list[Message]]] = {
    "messages": _own,
    "pairs": _pair,
    "gsm8k": _grade_school,
}


def _trees(file: File, items: Iterator[Object | Malformed]) -> Iterator[Dialogue | Malformed]:
    """Yield the best path of each tree of messages."""
    ids: set[str] = set()
    replies: dict[str | None, list[Object]] = defaultdict(list)  # by their parent's id
    for item in items:
        if isinstance(item, Malformed):
            yield item
            continue
        error = _wrong_message(item.values)
        if error is None and item.values["message_id"] in ids:
            error = f"`message_id` {item.values['message_id']} belongs to another row too"
        if error is not None:
            yield _malformed(item, error)
            continue
        ids.add(item.values["message_id"])
        if not item.values.get("deleted"):
            replies[item.values["parent_id"]].append(item)
    for parent, orphans in replies.items():
        if parent is not None and parent not in ids:
            for orphan in orphans:
                yield _malformed(orphan, f"`parent_id` {parent} is not a message of the file")
    for root in replies[None]:
        path = [root]
        while (best := _best_reply(path[-1], replies)) is not None:
            path.append(best)
        while len(path) > 1 and path[-1].values["role"] != "assistant":
            path.pop()
        messages = [Message(role=ROLES[item.values["role"]], content=item.values["text"]) for item in path]
        yield _dialogue(file, root, messages)


def _wrong_message(values: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a message of a tree, or None."""
    try:
        _text(values, "message_id")
        _text(values, "text")
    except ValueError as error:
        return str(error)
    if values.get("role") not in tuple(ROLES):  # whatever its type
        return f"role {values.get('role')!r} is none of {' and '.join(ROLES)}"
    parent = values.get("parent_id")
    if not (parent is None or isinstance(parent, str)):
        return f"`parent_id` is {type(parent).__name__}, not text"
    rank = values.get("rank")
    return None if rank is None or isinstance(rank, int) else f"`rank` is {rank!r}, not a whole number"


def _best_reply(message: Object, replies: Mapping[str | None, list[Object]]) -> Object | None:
    """Return the reply with which a path continues, or None at its end."""
    candidates = [
        reply
        for reply in replies.get(message.values["message_id"], [])
        if reply.values["role"] == "assistant" or replies.get(reply.values["message_id"])
    ]
    return min(candidates, key=_rank, default=None)


def _rank(message: Object) -> float:
    rank = message.values.get("rank")
    return float("inf") if rank is None else float(rank)
