"""Pairs of answers that somebody has chosen between: read public ones, and set unsound ones aside.

Files are JSON lines or one JSON array (.json), plain, .gz or .zst, by globs below a root directory that DVC watches or
by http(s) URLs. A source's `format` says how to read its rows; `auto` infers it from the columns of a file's first row:

- hh (HH-RLHF): `chosen` and `rejected` are whole transcripts that differ in the assistant's last turn only.
- pandalm (PandaLM): `instruction` and `input`, `response1` and `response2`, and three annotators' labels: 0 for a tie,
  1 or 2 for the better one. The majority counts; if it says tie, or no two agree, the pair is set aside.
- own: `messages` up to the user's turn, or one `prompt`; `chosen`, `rejected`; `degree`, `chosen_safe`,
  `rejected_safe`, `category` and `id` where given.

Public pairs have no degree unless a row gives one: their margin is 0. A row that is not a pair is set aside as
malformed; too many stop the stage.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypedDict

from pydantic import Field

from model.text.dialogue import Message, check
from tasks.reading import sources
from tasks.reading.contamination import REASON, EvaluationPrompts, asks_the_same
from tasks.reading.prompts import DEGREES, Kind, Responder, is_message
from tasks.reading.sources import File, Malformed, Object
from tasks.running.digests import number_of
from tasks.running.params import Section

Format = Literal["auto", "hh", "pandalm", "own"]
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
ROLES: Mapping[str, Literal["user", "assistant"]] = {"Human": "user", "Assistant": "assistant"}


class Tie(ValueError):  # noqa: N818 - not an error: nobody has won
    """A comparison in which nobody has won."""


class PairSource(Section):
    """One source of public pairs."""

    files: list[str] = Field(min_length=1, description="globs below the root, or http(s) URLs")
    format: Format = Field(description="format of its rows; auto: inferred from their columns")
    kind: Kind = Field(description="what its choices are about: helpfulness or safety")
    max_pairs: int | None = Field(gt=0, description="pairs drawn from it; null: all")


class Responders(TypedDict):
    """Who gave the two answers."""

    chosen: Responder
    rejected: Responder


class Preference(TypedDict):
    """Two answers to one prompt, and the choice between them; None: not given."""

    id: str
    messages: list[Message]
    chosen: str
    rejected: str
    degree: str | None
    kind: Kind
    chosen_safe: bool | None
    rejected_safe: bool | None
    category: str
    responders: Responders | None
    annotator: str
    source: str
    round: str | None


class Aside(TypedDict):
    """A pair or row that is set aside: why, and all that is known of it."""

    reason: str
    detail: str
    kind: Kind
    source: str
    pair: Any


def read_pairs(
    root: Path, named_sources: Mapping[str, PairSource], section: str, max_malformed_share: float
) -> tuple[list[Preference], list[Aside]]:
    """Return the pairs of all sources, in the sources' order, and the rows that are set aside.

    Raises ValueError for files that can't be found or read, for rows whose format can't be inferred, and for a source
    whose malformed rows exceed `max_malformed_share` of its rows.
    """
    as_files = {
        name: sources.Source(files=source.files, format="jsonl", text_field="")
        for name, source in named_sources.items()
    }
    found: dict[str, list[Preference]] = {name: [] for name in named_sources}
    aside: dict[str, list[Aside]] = {name: [] for name in named_sources}
    for file in sources.find_files(root, as_files, section):
        source = named_sources[file.source]
        for pair, refused in _read(file, source, section):
            if pair is not None:
                found[file.source].append(pair)
            if refused is not None:
                aside[file.source].append(refused)
    for name, source in named_sources.items():
        total = len(found[name]) + len(aside[name])
        malformed = [each for each in aside[name] if each["reason"] == "malformed"]
        if len(malformed) > max_malformed_share * total:
            first = malformed[0]
            raise ValueError(
                f"source `{name}`: {len(malformed)} of {total} rows are malformed, more than "
                f"`{section}.max_malformed_share` {max_malformed_share}; the first is row {first['pair']['row']} of "
                f"{first['pair']['file']}: {first['detail']}. Fix the source, or raise the share"
            )
        pairs = found[name]
        drawn = sorted(range(len(pairs)), key=lambda number: number_of(f"use {name} {pairs[number]['id']}"))
        for number in drawn[source.max_pairs :] if source.max_pairs else []:
            detail = f"`{section}.sources.{name}.max_pairs` is {source.max_pairs}"
            aside[name].append(_aside("not_drawn", detail, source.kind, name, pairs[number]))
        found[name] = [pairs[number] for number in sorted(drawn[: source.max_pairs])]
    return [pair for own in found.values() for pair in own], [each for own in aside.values() for each in own]


def _aside(reason: str, detail: str, kind: Kind, source: str, pair: Any) -> Aside:
    return {"reason": reason, "detail": detail, "kind": kind, "source": source, "pair": pair}


def _read(file: File, source: PairSource, section: str) -> Iterator[tuple[Preference | None, Aside | None]]:
    """Stream one file's pairs, and its rows that are not pairs."""
    reader: Reader | None = None
    for item in sources.read_objects(file):
        if isinstance(item, Malformed):
            yield None, _aside("malformed", item.error, source.kind, file.source, item._asdict())
            continue
        if reader is None:
            reader = READERS[source.format if source.format != "auto" else _format_of(item, file, section)]
        try:
            given = reader(item.values)
            if given["messages"][-1:] and given["messages"][-1]["role"] != "user":
                raise ValueError("`messages` end with an answer: the two to choose from follow the user's turn")
            check(given["messages"])
        except ValueError as error:
            raw = item.raw.decode("utf-8").rstrip("\r\n")
            row = Malformed(item.file, item.row, str(error), raw)._asdict()
            reason = "tie" if isinstance(error, Tie) else "malformed"
            yield None, _aside(reason, str(error), source.kind, file.source, row)
            continue
        pair = Preference(
            id=given.get("id") or f"{file.name}:{item.row}",
            messages=given["messages"],
            chosen=given["chosen"],
            rejected=given["rejected"],
            degree=given.get("degree"),
            kind=source.kind,
            chosen_safe=given.get("chosen_safe"),
            rejected_safe=given.get("rejected_safe"),
            category=given.get("category") or file.source,
            responders=None,
            annotator=file.source,
            source=file.source,
            round=None,
        )
        yield pair, None


def _format_of(first: Object, file: File, section: str) -> Format:
    columns = first.values.keys()
    if {"response1", "response2", "annotator1"} <= columns:
        return "pandalm"
    if {"chosen", "rejected"} <= columns:
        return "own" if {"messages", "prompt"} & columns else "hh"
    raise ValueError(
        f"{file.location}: its format can't be inferred from its columns ({', '.join(columns)}): set "
        f"`{section}.sources.{file.source}.format`, or convert it to the form `own`"
    )


def _text(values: Mapping[str, Any], column: str) -> str:
    if not isinstance(values.get(column), str):
        raise ValueError(f"`{column}` is {type(values.get(column)).__name__}, not text")
    return str(values[column])


def _transcripts(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parse a row of HH-RLHF: two transcripts."""
    chosen, rejected = (_turns(_text(values, side), side) for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise ValueError("the two transcripts differ before the last turn")
    return {"messages": chosen[:-1], "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def _turns(transcript: str, side: str) -> list[Message]:
    before, *parts = TURN.split(transcript)
    if before.strip() or len(parts) < 4 or parts[-2] != "Assistant":
        raise ValueError(f"`{side}` is not a transcript that begins with `Human:` and ends with an `Assistant:` turn")
    return [Message(role=ROLES[name], content=said.strip()) for name, said in zip(parts[::2], parts[1::2], strict=True)]


def _compared(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parse a row of PandaLM: a comparison by three annotators."""
    prompt = f"{_text(values, 'instruction').strip()}\n\n{_text(values, 'input').strip()}".strip()
    responses = {number: _text(values, f"response{number}").strip() for number in (1, 2)}
    labels: list[Any] = [values.get(f"annotator{number}") for number in (1, 2, 3)]
    for number, label in enumerate(labels, start=1):
        if label not in (0, 1, 2):
            raise ValueError(f"`annotator{number}` is {label!r}, which is none of 0, 1 and 2")
    ((label, votes),) = Counter(map(int, labels)).most_common(1)
    if label == 0 or votes == 1:
        raise Tie(f"the three annotators say {', '.join(map(str, labels))}")
    chosen, rejected = responses[label], responses[3 - label]
    return {"messages": [Message(role="user", content=prompt)], "chosen": chosen, "rejected": rejected}


def _own(values: Mapping[str, Any]) -> dict[str, Any]:
    """Parse a pair in this project's own form."""
    given = values.get("messages")
    if "messages" not in values:
        given = [Message(role="user", content=_text(values, "prompt"))]
    if not isinstance(given, list) or not all(is_message(message) for message in given):
        raise ValueError("`messages` is not a list of objects with `role` and `content`")
    found: dict[str, Any] = {
        "messages": [Message(role=message["role"], content=message["content"]) for message in given],
        "chosen": _text(values, "chosen"),
        "rejected": _text(values, "rejected"),
    }
    kinds: Mapping[str, type] = {"degree": str, "chosen_safe": bool, "rejected_safe": bool}
    for column, kind in kinds.items():
        value = values.get(column)
        if not (value is None or isinstance(value, kind)):
            raise ValueError(f"`{column}` is {value!r}, not a {kind.__name__}")
        found[column] = value
    return found | {column: _text(values, column) for column in ("id", "category") if column in values}


Reader = Callable[[Mapping[str, Any]], dict[str, Any]]
READERS: Mapping[Format, Reader] = {
    "hh": _transcripts,
    "pandalm": _compared,
    "own": _own,
}


# --- what sets a pair aside ---


def sift(preferences: Iterable[Preference], evaluation: EvaluationPrompts) -> tuple[list[Preference], list[Aside]]:
    """Return the pairs to learn from, and those that are set aside: see `fault_of`."""
    kept: list[Preference] = []
    aside: list[Aside] = []
    for pair in preferences:
        fault = fault_of(pair, evaluation)
        if fault is None:
            kept.append(pair)
        else:
            aside.append(_aside(*fault, pair["kind"], pair["source"], pair))
    return kept, aside


def fault_of(pair: Preference, evaluation: EvaluationPrompts) -> tuple[str, str] | None:
    """Return why a pair should not be learned from, in a word and in a sentence; None if it is sound."""
    for side in ("chosen", "rejected"):
        answer = pair["chosen"] if side == "chosen" else pair["rejected"]
        if not answer.strip():
            return "empty", f"the {side} answer is empty"
        try:
            check([*pair["messages"], {"role": "assistant", "content": answer}])
        except ValueError as error:
            return "malformed", f"the {side} answer can't be encoded: {error}"
    if pair["chosen"].strip() == pair["rejected"].strip():
        return "identical", "both answers are the same"
    if pair["degree"] is not None and pair["degree"] not in DEGREES:
        return "unknown_degree", f"degree {pair['degree']!r} is none of {', '.join(DEGREES)}"
    if pair["chosen_safe"] is False and pair["rejected_safe"] is True:
        return "chosen_unsafe", "the chosen answer is unsafe and the other is safe"
    if asks_the_same(pair["messages"], evaluation):
        return "evaluation_prompt", REASON
    return None
