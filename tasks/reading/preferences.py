"""Read the preferences that reward models learn from, and encode a dialogue with its answer."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.text.dialogue import Message, encode_dialogue
from model.text.tokenizer import Tokenizer
from tasks.reading.prompts import Degree, Kind


class Preference(BaseModel):
    """Two answers to a dialogue that ends with the user's turn, and which one was chosen; other fields are kept."""

    model_config = ConfigDict(frozen=True, extra="allow")

    id: str
    kind: Kind
    messages: list[dict[str, str]] = Field(min_length=1)
    chosen: str
    rejected: str
    degree: Degree | None  # None: not given
    chosen_safe: bool | None  # None: not known
    rejected_safe: bool | None
    source: str
    round: str | None  # None: open-source


def read_preferences(path: Path) -> list[Preference]:
    """Return the preferences of a file of JSON lines.

    Raises ValueError, naming the file and line, when it is missing or a line is not a preference.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: run the stage `preferences` first")
    preferences = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                preferences.append(Preference.model_validate_json(line))
            except ValidationError as error:
                wrong = error.errors()[0]
                what = f"`{'.'.join(map(str, wrong['loc']))}`: {wrong['msg']}".removeprefix("``: ")
                raise ValueError(f"{path}, line {number} is not a preference: {what}") from None
    return preferences


def ids_of(preference: Preference, answer: str, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of a dialogue and its answer, up to the EOS at which it is scored."""
    messages = [*preference.messages, {"role": "assistant", "content": answer}]
    try:
        return encode_dialogue(cast(list[Message], messages), tokenizer).ids
    except ValueError as error:
        raise ValueError(f"pair {preference.id} of {preference.source}: {error}") from None
