"""The rounds of RLHF, `rounds` in params.yaml: what each one starts from (Llama 2, section 3.2.3)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import Field

from tasks.running.params import Section, parse_section, read_params
from tasks.running.places import DATA, NOTHING, entry_of

Entry = TypeVar("Entry", bound=Section)
JOINED = ("ghost_attention", "context_distillation")  # stages whose data sets join a round's samples
NAME = re.compile(r"v([1-9][0-9]*)")


class Round(Section):
    """What one round starts from; a path of data/seeds/none stands for nothing."""

    newest: str = Field(min_length=1, description="checkpoint of the newest chat model")
    earlier: str = Field(min_length=1, description="checkpoint of an earlier one, for answers to compare with")
    batches: str = Field(min_length=1, description="preferences of the round before, or a directory of public pairs")
    samples: str = Field(min_length=1, description=f"samples of the round before, whose best are kept; or {NOTHING}")
    distil_from: str = Field(
        min_length=1, description=f"samples of a larger model, to be learnt in place of own ones; or {NOTHING}"
    )
    ghost_attention: str = Field(
        min_length=1, description=f"dialogues that keep an instruction, which the version learns, too; or {NOTHING}"
    )
    context_distillation: str = Field(
        min_length=1, description=f"safe answers without their pre-prompt, which it learns, too; or {NOTHING}"
    )


class Joining(Section):
    """What a round's stage whose data set joins the samples starts from."""

    newest: str = Field(min_length=1, description="checkpoint of the newest chat model, which answers")
    earlier: str = Field(min_length=1, description=f"what an earlier round has of it, which is kept; or {NOTHING}")


class Place(NamedTuple):
    """One round and its number among all; v1 is number 0."""

    name: str
    number: int
    round: Round


def round_of(stage_name: str) -> Place:
    """Return the round that an entry of a stage is about: `responses@v1` is about v1.

    Raises ValueError as `round_named` does.
    """
    return round_named(entry_of(stage_name))


def round_named(name: str) -> Place:
    """Return a round of params.yaml.

    Raises ValueError when there is no such round or an invalid one, and as `round_number` and `check_sources` do.
    """
    rounds = read_params().get("rounds")
    if not isinstance(rounds, dict) or not rounds:
        raise ValueError(
            "params.yaml: `rounds` names no round: it needs at least one, such as `v1: {newest, earlier, batches, "
            "samples, distil_from, ghost_attention, context_distillation}`"
        )
    own = parse_section(Round, {f"rounds.{key}": value for key, value in rounds.items()}, f"rounds.{name}")
    place = Place(name, round_number(name), own)
    check_sources(place, rounds)
    return place


def entry_at(place: Place, entries: Mapping[str, Entry], section: str) -> Entry:
    """Return a round's entry of a section that has its own `rounds`. Raises ValueError when it has none."""
    if place.name not in entries:
        there = ", ".join(f"{section}@{name}" for name in entries) or "none"
        raise ValueError(f"params.yaml: `{section}.rounds` has no `{place.name}`: it has {there}")
    return entries[place.name]


def round_number(name: str) -> int:
    """Return a round's number, from its name alone: adding or removing other rounds doesn't change it.

    Raises ValueError for a name without a number.
    """
    found = NAME.fullmatch(name)
    if found is None:
        raise ValueError(f"params.yaml: `{name}` is not a round's name: call rounds v1, v2 and so on, in their order")
    return int(found[1]) - 1


def check_sources(place: Place, names: Iterable[str]) -> None:
    """Raise ValueError when a round starts from what it makes itself, or from a round that isn't before it or missing.

    The data sets that join its samples may be its own. What a stage of a round writes is data/<stage>/<round>; any
    other path is not looked at.
    """
    for field, path in place.round.model_dump().items():
        parts = Path(path).parts
        if len(parts) < 3 or parts[0] != str(DATA) or not NAME.fullmatch(parts[2]):
            continue
        source, where = parts[2], f"params.yaml: `rounds.{place.name}.{field}` is {path}"
        if source == place.name and field not in JOINED:
            raise ValueError(f"{where}, which the round makes itself: name what an earlier round has made")
        if round_number(source) > place.number:
            raise ValueError(f"{where}, which a later round makes: name what an earlier round has made")
        if source not in names:
            raise ValueError(f"{where}, but `rounds` has no {source}: add that round, or name what another has made")
