"""Instructions that are to hold in a whole dialogue, and how a program checks an answer (Llama 2, section 3.3).

A file of instructions, JSON, has a mapping for each kind of instruction: `wordings` and `terse` ones, with
`{value}` where one of the `values` goes; `required` and `forbidden`, regular expressions of an answer, which may have
`{value}` too, or a mapping with one for each value; `about`, a regular expression of the user's turns whose answers
show it, null for all; `excludes`, the kinds that it is not combined with; and `drawn`, if the chat model itself is
asked for values: what the `system` and the `user` say, and a `pattern` whose first group is a value.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from tasks.running.params import Section

PLACE = "{value}"


class Drawing(Section):
    """How the chat model is asked for values."""

    system: str = Field(description="system message; empty: none")
    user: str = Field(min_length=1, description="what the user asks")
    pattern: str = Field(min_length=1, description="regular expression of its answer; the first group is a value")


class Kind(Section):
    """One kind of instruction."""

    wordings: list[str] = Field(description="sentences that give the instruction, with {value}")
    terse: list[str] = Field(description="the same in fewer words, such as `Hobby: {value}`")
    values: list[str] = Field(min_length=1, description="what the instruction is about; one empty text if nothing")
    drawn: Drawing | None = Field(description="how the chat model is asked for values; null: it is not")
    about: str | None = Field(description="expression of the user's turns whose answers show it; null: all")
    required: str | dict[str, str] | None = Field(
        description="expression that an answer must have, by value or for all"
    )
    forbidden: str | dict[str, str] | None = Field(description="expression that an answer must not have; null: none")
    excludes: list[str] = Field(description="kinds that it is not combined with, such as those that contradict it")

    @model_validator(mode="after")
    def _can_be_said_and_checked(self) -> Self:
        if not (self.wordings or self.terse):
            raise ValueError("it has neither `wordings` nor `terse` ones: write how it is said")
        if self.required is None and self.forbidden is None:
            raise ValueError("no check knows it: write what an answer must have (`required`) or not (`forbidden`)")
        for which in (self.required, self.forbidden):
            missing = sorted(set(self.values) - set(which)) if isinstance(which, dict) else []
            if missing:
                raise ValueError(f"its expressions leave out the value {missing[0]!r}: add one for it")
            if isinstance(which, dict) and self.drawn:
                raise ValueError("its expressions are by value, and `drawn` would give others: write one for all")
        return self


class Instruction(NamedTuple):
    """One instruction as it is given to a dialogue."""

    kind: str
    value: str
    text: str


class Rule(NamedTuple):
    """Instructions that hold together in one dialogue."""

    instructions: Sequence[Instruction]

    @property
    def text(self) -> str:
        """What the model reads."""
        return " ".join(each.text for each in self.instructions)


def read_kinds(path: Path, parameter: str) -> dict[str, Kind]:
    """Return the kinds of instruction in a file.

    Raises ValueError for a file that is missing or holds none, for a kind that is not one, which no program can check,
    whose expressions are not valid, or that excludes a kind which isn't there.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: correct `{parameter}`, or run the stage that writes it")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{path} holds no kind of instruction: it needs a mapping of kinds")
    kinds = {}
    for name, own in values.items():
        try:
            kinds[str(name)] = Kind.model_validate(own)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            found = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{path}: instruction `{name}`{place and f', `{place}`'}: {found}") from None
    for name, kind in kinds.items():
        unknown = sorted(set(kind.excludes) - set(kinds))
        if unknown:
            raise ValueError(f"{path}: instruction `{name}` excludes `{unknown[0]}`, which is not there: {list(kinds)}")
        for value in kind.values:
            for which in (kind.required, kind.forbidden):
                _compiled(which, value, f"{path}: instruction `{name}`")
        _compiled(kind.about, "", f"{path}: instruction `{name}`")
        drawn = kind.drawn and _compiled(kind.drawn.pattern, "", f"{path}: instruction `{name}`")
        if drawn and drawn.groups != 1:
            raise ValueError(
                f"{path}: instruction `{name}`: `drawn.pattern` needs one group, the value: {drawn.pattern!r}"
            )
    return kinds


def draw_rule(
    kinds: Mapping[str, Kind],
    values: Mapping[str, Sequence[str]],
    first: str,
    combined_share: float,
    terse_share: float,
    generator: random.Random,
) -> Rule:
    """Draw instructions for a dialogue: one of the first kind, and at times one of a kind that goes with it."""
    names = [first]
    others = [name for name in kinds if go_together(kinds, first, name)]
    if others and generator.random() < combined_share:
        names.append(generator.choice(others))
    found = []
    for name in names:
        kind, value = kinds[name], generator.choice(values[name])
        is_terse = kind.terse and (not kind.wordings or generator.random() < terse_share)
        text = generator.choice(kind.terse if is_terse else kind.wordings)
        found.append(Instruction(name, value, text.replace(PLACE, value)))
    return Rule(found)


def go_together(kinds: Mapping[str, Kind], first: str, second: str) -> bool:
    """Tell whether two kinds may hold together."""
    return first != second and second not in kinds[first].excludes and first not in kinds[second].excludes


def shown_in(kinds: Mapping[str, Kind], rule: Rule, user: str) -> list[Instruction]:
    """Return the instructions that the answer to a user's turn can show."""
    found = []
    for each in rule.instructions:
        about = kinds[each.kind].about
        if about is None or re.search(about, user, re.IGNORECASE):
            found.append(each)
    return found


def respects(kinds: Mapping[str, Kind], instruction: Instruction, answer: str) -> bool:
    """Tell whether an answer respects an instruction."""
    kind, text = kinds[instruction.kind], answer.strip()
    required = _compiled(kind.required, instruction.value, instruction.kind)
    forbidden = _compiled(kind.forbidden, instruction.value, instruction.kind)
    return bool((required is None or required.search(text)) and not (forbidden and forbidden.search(text)))


def values_in(kind: Kind, answers: Sequence[str], min_count: int) -> list[str]:
    """Return the values that a chat model gave in at least so many answers, the most frequent first."""
    assert kind.drawn is not None
    matches = (re.search(kind.drawn.pattern, answer, re.IGNORECASE) for answer in answers)
    found = [match.group(1) for match in matches if match and match.group(1)]
    counts = Counter(found)
    return sorted((value for value in counts if counts[value] >= min_count), key=lambda value: (-counts[value], value))


def _compiled(which: str | Mapping[str, str] | None, value: str, where: str) -> re.Pattern[str] | None:
    """Return an expression with its value in place. Raises ValueError, naming it, for one that is not valid."""
    expression = which.get(value) if isinstance(which, Mapping) else which
    if expression is None:
        return None
    try:
        return re.compile(expression.replace(PLACE, re.escape(value)), re.IGNORECASE)
    except re.error as error:
        raise ValueError(f"{where}: {expression!r} is no regular expression: {error}") from None
