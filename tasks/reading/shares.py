"""The prompts that a round asks: its share of prompt files that all rounds divide among them.

A hash of a prompt's id assigns it to one round, so rounds share no prompts and adding one changes no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from tasks.reading.prompts import KINDS, Kind, Prompt, read_prompts
from tasks.reading.rounds import Place
from tasks.running.digests import number_of
from tasks.running.params import Section


class Files(Section):
    """The prompt file of each kind."""

    helpfulness: str = Field(min_length=1, description="JSON lines of prompts")
    safety: str = Field(min_length=1, description="JSON lines of adversarial prompts")


class Numbers(Section):
    """How many prompts of each kind."""

    helpfulness: int = Field(ge=0, description="maximum prompts; 0: none, and their file is not read")
    safety: int = Field(ge=0, description="maximum prompts; 0: none, and their file is not read")


class Asked(NamedTuple):
    """A prompt and the kind of preference that its answers are for."""

    kind: Kind
    prompt: Prompt


def shares_of(place: Place, files: Files, limits: Numbers, num_rounds: int, section: str) -> dict[Kind, list[Prompt]]:
    """Return the round's share of each kind's prompts, in their file's order; none of a kind whose limit is 0.

    Raises ValueError as `read_share` does.
    """
    return {
        kind: read_share(place, Path(getattr(files, kind)), num_rounds, section, f"prompts.{kind}")
        if getattr(limits, kind)
        else []
        for kind in KINDS
    }


def read_share(place: Place, path: Path, num_rounds: int, section: str, parameter: str) -> list[Prompt]:
    """Return the round's share of a file's prompts, in the file's order; `parameter` names the file.

    Raises ValueError for a round beyond those that share the prompts, and as `read_prompts` does.
    """
    if place.number >= num_rounds:
        raise ValueError(
            f"params.yaml: `rounds.{place.name}`: the prompts are divided among `{section}.num_rounds` {num_rounds} "
            "rounds: raise it, which gives every round other prompts"
        )
    return share_of(read_prompts([path], f"{section}.{parameter}"), place.number, num_rounds)


def share_of(prompts: Sequence[Prompt], number: int, num_rounds: int) -> list[Prompt]:
    """Return the prompts of round `number`, in their order."""
    return [prompt for prompt in prompts if number_of(f"round {prompt.id}") % num_rounds == number]


def at_most(prompts: Sequence[Prompt], limit: int, use: str = "use") -> list[Prompt]:
    """Return the prompts in their order; if more than `limit`, the first by a hash, which another `use` changes."""
    drawn = sorted(prompts, key=lambda prompt: number_of(f"{use} {prompt.id}"))[:limit]
    ids = {prompt.id for prompt in drawn}
    return [prompt for prompt in prompts if prompt.id in ids]
