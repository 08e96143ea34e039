"""Safety pre-prompts: adjectives of a good assistant, and templates of an answer (Llama 2, section 4.2.4).

They are drawn by hashes of seed and prompt: what one prompt gets depends on no other prompt.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple, Self

from pydantic import Field, ValidationError, model_validator

from model.text.dialogue import TAGS, Message
from tasks.reading.prompts import Prompt
from tasks.running.digests import fraction_of, number_of
from tasks.running.params import Section

PLACES = ({"first"}, {"first", "second"})  # that a frame may have


class Template(Section):
    """What an answer to prompts of one category of risk should say."""

    wordings: list[str] = Field(min_length=1, description="ways to put it, of which one is drawn")


class Preprompts(Section):
    """What pre-prompts are made from."""

    adjectives: list[str] = Field(min_length=1, description="of a good assistant")
    frames: list[str] = Field(min_length=1, description="sentences with a place {first}, or also {second}")
    templates: dict[str, Template] = Field(description="by category of risk")

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if len(set(self.adjectives)) < len(self.adjectives):
            raise ValueError(f"`adjectives` has one twice: {', '.join(self.adjectives)}")
        for frame in self.frames:
            places = places_of(frame)
            if places not in PLACES:
                named = ", ".join(f"{{{place}}}" for place in sorted(places)) or "none"
                raise ValueError(
                    f"frame `{frame}` has the places {named}: it needs {{first}}, or {{first}} and {{second}}"
                )
            if len(places) > len(self.adjectives):
                raise ValueError(f"frame `{frame}` needs two adjectives, and `adjectives` has one")
        wordings = [wording for template in self.templates.values() for wording in template.wordings]
        for text in (*self.adjectives, *self.frames, *wordings):
            tag = TAGS.search(text)
            if tag:
                raise ValueError(f"`{text}` contains {tag.group()}, a tag of the chat format: remove it")
        return self


class Preprompt(NamedTuple):
    """A pre-prompt; `has_template`: it also says what the answer should."""

    text: str
    has_template: bool


def places_of(frame: str) -> set[str]:
    """Return the names of a frame's places. Raises ValueError for braces that are no place."""
    return {name for _, name, _, _ in Formatter().parse(frame) if name is not None}


def read_preprompts(path: Path) -> Preprompts:
    """Return what a file of pre-prompts holds. Raises ValueError, naming it, when it is missing or wrong."""
    try:
        return Preprompts.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(
            f"{path} is missing: correct `context_distillation.preprompts`, or restore it with `git checkout`"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error.errors()[0])}") from None


def explain(detail: Any) -> str:
    """Return what is wrong in a file of pre-prompts: where, what was found, what it must be."""
    message = detail["msg"].removeprefix("Value error, ")
    dotted = ".".join(map(str, detail["loc"]))
    return f"`{dotted}`: {message}" if dotted else message


def check_risks(preprompts: Preprompts, prompts: Sequence[Prompt], path: Path) -> None:
    """Raise ValueError when prompts name a category of risk that has no template."""
    for prompt in prompts:
        if prompt.risk not in preprompts.templates:
            known = ", ".join(preprompts.templates) or "none"
            raise ValueError(
                f"{path} has no template for the risk `{prompt.risk}` of prompt {prompt.id}; it has {known}: add "
                f"[templates.{prompt.risk}] with `wordings`"
            )


def draw_preprompts(
    preprompts: Preprompts, prompt: Prompt, num_preprompts: int, template_share: float, seed: int
) -> list[Preprompt]:
    """Return a prompt's pre-prompts; `template_share` of them, to within one, have the template of its risk."""
    assert prompt.risk is not None
    begin = fraction_of(f"{seed} template {prompt.id}")
    wordings = preprompts.templates[prompt.risk].wordings
    drawn = []
    for number in range(num_preprompts):
        about = f"{seed} preprompt {prompt.id} {number}"
        frame = preprompts.frames[number_of(f"{about} frame") % len(preprompts.frames)]
        first, *others = sorted(preprompts.adjectives, key=lambda adjective: number_of(f"{about} {adjective}"))
        text = frame.format(first=first, second=others[0] if others else "")
        has_template = math.floor(begin + (number + 1) * template_share) > math.floor(begin + number * template_share)
        if has_template:
            text += " " + wordings[number_of(f"{about} wording") % len(wordings)]
        drawn.append(Preprompt(text, has_template))
    return drawn


def with_preprompt(messages: Sequence[Message], text: str) -> list[Message]:
    """Return a dialogue with a pre-prompt as its system message, on a line before the one that it may have."""
    if messages[0]["role"] == "system":
        return [Message(role="system", content=f"{text}\n{messages[0]['content']}"), *messages[1:]]
    return [Message(role="system", content=text), *messages]
