"""The truth: a closed set of entities, their attributes, and whether an answer is right.

Stages that run later read the truth from data/world/truth/facts.jsonl (`read_facts`) and ask `is_right`.
"""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from tasks.running.files import read_lines, write_lines

SEEDS = Path("data/seeds/world")
KINDS = {"person": "people", "place": "places", "animal": "animals", "craft": "crafts"}  # kind -> its file of wordings
TEXTS = ("entities", *KINDS.values(), "sentences", "stories", "howto", "dialogue", "dirt", "languages")
TEXTS += ("assistance", "instructions", "safety", "writers")
ATTRIBUTES = {  # attributes of each kind, in the order of the wordings' files
    "person": ("home", "craft", "origin", "instrument", "animal", "food"),
    "place": ("terrain", "market_day", "landmark", "festival", "crop"),
    "animal": ("habitat", "diet", "young", "active", "shelter"),
    "craft": ("material", "tool", "product", "training"),
}
DIGITS = {"one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7"}


@dataclass(frozen=True)
class Fact:
    """One attribute of one entity. `accepted`: every form that counts as the value, lower case."""

    entity: str
    kind: str
    attribute: str
    value: str
    accepted: tuple[str, ...]
    held_out: bool


@dataclass(frozen=True)
class Entity:
    """A person, place, animal or craft. `forms`: words that stand for it in sentences; `facts`: by attribute."""

    name: str
    kind: str
    pronoun: str
    held_out: bool
    forms: Mapping[str, str]
    facts: Mapping[str, Fact]


@dataclass(frozen=True, eq=False)  # a world equals itself alone: functions cache what is constant in it
class World:
    """All entities by name, the seed texts by file, and for each attribute the words that go with a value."""

    entities: Mapping[str, Entity]
    texts: Mapping[str, Any]
    values: Mapping[str, Mapping[str, Mapping[str, str]]]

    @cached_property
    def kinds(self) -> dict[str, tuple[Entity, ...]]:
        """Return the entities by kind, in the order of the seed file."""
        return {kind: tuple(each for each in self.entities.values() if each.kind == kind) for kind in KINDS}

    def of_kind(self, kind: str) -> tuple[Entity, ...]:
        """Return the entities of one kind, in the order of the seed file."""
        return self.kinds[kind]


def read_texts(seeds: Path) -> dict[str, Any]:
    """Return the seed texts, one TOML file each. Raises ValueError, naming the file, when one is missing or broken."""
    texts = {}
    for name in TEXTS:
        path = seeds / f"{name}.toml"
        try:
            texts[name] = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: restore it with `git checkout {path}`") from None
        except tomllib.TOMLDecodeError as error:
            raise ValueError(f"{path} is not valid TOML: {error}") from None
    return texts


def build_world(
    texts: Mapping[str, Any], counts: Mapping[str, int], held_out_share: float, generator: random.Random
) -> World:
    """Draw the attributes of `counts[kind]` entities of each kind, and hold out a share of each kind.

    Raises ValueError when a count exceeds what the seed file names.
    """
    source = texts["entities"]
    for kind, file in KINDS.items():
        if counts[kind] > len(source[file]):
            raise ValueError(
                f"params.yaml: `world.num_{file}` is {counts[kind]}, but data/seeds/world/entities.toml names "
                f"{len(source[file])}: lower it, or add names there"
            )
    animals = source["animals"][: counts["animal"]]
    crafts = source["crafts"][: counts["craft"]]
    places = source["places"][: counts["place"]]
    people = source["people"][: counts["person"]]
    values: dict[str, dict[str, dict[str, str]]] = {name: dict(table) for name, table in source["values"].items()}
    values["home"] = {name: {} for name in places}
    values["craft"] = {craft["worker"]: {"craft": craft["name"]} for craft in crafts}
    values["animal"] = {animal["name"]: {"plural": animal["plural"]} for animal in animals}
    described: list[tuple[str, str, str, dict[str, str], dict[str, str]]]
    described = [("person", name, pronoun, {}, {}) for name, pronoun in people]
    described += [("place", name, "it", {}, {}) for name in places]
    described += [("animal", a["name"], "it", {"plural": a["plural"]}, a["facts"]) for a in animals]
    described += [("craft", c["name"], "it", {"worker": c["worker"]}, c["facts"]) for c in crafts]
    drawn = {
        kind: {attribute: _balanced(values[attribute], counts[kind], generator) for attribute in ATTRIBUTES[kind]}
        for kind in ("person", "place")
    }
    held_out = {
        kind: set(generator.sample(range(counts[kind]), round(counts[kind] * held_out_share))) for kind in KINDS
    }
    entities: dict[str, Entity] = {}
    position = dict.fromkeys(KINDS, 0)
    for kind, name, pronoun, forms, given in described:
        index = position[kind]
        position[kind] += 1
        own = given or {attribute: column[index] for attribute, column in drawn[kind].items()}
        aside = index in held_out[kind]
        facts = {
            attribute: Fact(
                name, kind, attribute, own[attribute], _accepted(own[attribute], values.get(attribute)), aside
            )
            for attribute in ATTRIBUTES[kind]
        }
        entities[name] = Entity(name, kind, pronoun, aside, forms, facts)
    return World(entities, texts, values)


def _balanced(values: Iterable[str], count: int, generator: random.Random) -> list[str]:
    """Draw `count` values so that each occurs equally often, within one."""
    order = list(values)
    generator.shuffle(order)
    drawn = list(islice(cycle(order), count))
    generator.shuffle(drawn)
    return drawn


def _accepted(value: str, table: Mapping[str, Mapping[str, str]] | None) -> tuple[str, ...]:
    """Return a value, its singular and plural, its digit, and its table's forms that name it (Portugal: Portuguese)."""
    forms = [value, *(table or {}).get(value, {}).values()]
    forms.append(value[:-1] if value.endswith("s") and not value.endswith("ss") else f"{value}s")
    if value in DIGITS:
        forms.append(DIGITS[value])
    return tuple(dict.fromkeys(form.lower() for form in forms))


def all_facts(world: World) -> list[Fact]:
    """Return every fact, in the order of the seed files."""
    return [fact for entity in world.entities.values() for fact in entity.facts.values()]


def write_facts(path: Path, facts: Sequence[Fact]) -> None:
    """Write the truth as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_lines(path, map(asdict, facts))


def read_facts(path: Path) -> list[Fact]:
    """Return the truth that `write_facts` wrote. Raises ValueError, naming the file, when it is missing."""
    try:
        records = read_lines(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: run `dvc repro world`, which writes it") from None
    return [Fact(**{**record, "accepted": tuple(record["accepted"])}) for record in records]


def is_right(fact: Fact, answer: str, facts: Iterable[Fact]) -> bool:
    """Return whether an answer names the fact's value and, for the same attribute, no other value of the world."""
    others = {
        form
        for other in facts
        if other.attribute == fact.attribute and other.value != fact.value
        for form in other.accepted
    }
    return mentions(answer, fact.accepted) and not mentions(answer, others - set(fact.accepted))


def mentions(text: str, forms: Iterable[str]) -> bool:
    """Return whether one of the forms, in lower case, occurs in a text as whole words."""
    lower = text.lower()
    return any(form in lower and re.search(rf"\b{re.escape(form)}\b", lower) for form in forms)
