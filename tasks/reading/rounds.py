"""The rounds of RLHF, `rounds` in params.yaml: what each one starts from (Llama 2, section 3.2.3)."""

from __future__ import annotations

import re
from typing import NamedTuple

from pydantic import Field

from tasks.running.params import Section, parse_section, read_params
from tasks.running.places import entry_of

NAME = re.compile(r"v([1-9][0-9]*)")


class Round(Section):
    """What one round of preferences starts from."""

    newest: str = Field(min_length=1, description="checkpoint of the newest chat model")
    earlier: str = Field(min_length=1, description="checkpoint of an earlier one, for answers to compare with")
    batches: str = Field(min_length=1, description="preferences of the round before, or a directory of public pairs")
    samples: str = Field(min_length=1, description="rejection samples of the round before; data/seeds/none: none")
    distil_from: str = Field(
        min_length=1, description="a larger model's rejection samples, in place of own ones; data/seeds/none: draw own"
    )


class Place(NamedTuple):
    """One round and its number among all; v1 is number 0."""

    name: str
    number: int
    round: Round


def round_of(stage_name: str) -> Place:
    """Return the round that an entry of a stage is about: `responses@v1` is about v1.

    Raises ValueError when params.yaml has no such round or an invalid one, and as `round_number` does.
    """
    name = entry_of(stage_name)
    rounds = read_params().get("rounds")
    if not isinstance(rounds, dict) or not rounds:
        raise ValueError(
            "params.yaml: `rounds` names no round: it needs at least one, such as "
            "`v1: {newest, earlier, batches, samples, distil_from}`"
        )
    own = parse_section(Round, {f"rounds.{key}": value for key, value in rounds.items()}, f"rounds.{name}")
    return Place(name, round_number(name), own)


def round_number(name: str) -> int:
    """Return a round's number, from its name alone: adding or removing other rounds doesn't change it.

    Raises ValueError for a name without a number.
    """
    found = NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"params.yaml: `{name}` is not a round's name: call rounds v1, v2 and so on, in their order")
    return int(found[1]) - 1
