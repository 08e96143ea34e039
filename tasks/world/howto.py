"""How-to texts: crafts step by step, animals to watch, towns to visit, dishes to cook, instruments to learn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tasks.world.entries import told
from tasks.world.facts import World
from tasks.world.wording import capitalized, fields

TOPICS = {"crafts": "craft", "animals": "animal", "places": "place", "cooking": "person", "music": "person"}  # -> kind


def subjects(world: World) -> list[tuple[str, str]]:
    """Return every topic with every entity it can be about."""
    return [(topic, entity.name) for topic, kind in TOPICS.items() for entity in world.of_kind(kind)]


def howto(world: World, topic: str, name: str, generator: random.Random) -> str:
    """Write instructions about one entity: title, introduction, steps as prose or numbered, and a closing remark."""
    texts = world.texts["howto"]
    table = texts[topic]
    entity = world.entities[name]
    words = fields(world, entity)
    facts = generator.sample(list(entity.facts.values()), 2)
    intro = [generator.choice(table["intros"]), *told(world, facts, False, generator)]
    steps = drawn_steps(table, name, generator)
    lines = [with_number(step, words, generator) for step in steps]
    outros = [with_number(text, words, generator) for text in generator.sample(table["outros"], 2)]
    paragraphs = [with_number(generator.choice(table["titles"]), words, generator)]
    paragraphs.append(" ".join(with_number(text, words, generator) for text in intro))
    paragraphs.append(numbered(lines) if generator.random() < 0.3 else prose(texts, lines, generator))
    paragraphs.append(" ".join(outros))
    return "\n\n".join(paragraphs)


def drawn_steps(table: dict[str, Any], name: str, generator: random.Random) -> list[str]:
    """Draw steps in an order that makes sense: a craft's own steps among general advice, or a choice of the topic's."""
    if isinstance(table["steps"], dict):
        steps = list(table["steps"].get(name, table["fallback"]))
        if len(steps) > 4:
            del steps[generator.randrange(1, len(steps) - 1)]
        for advice in generator.sample(table["advice"], 3):
            steps.insert(generator.randrange(len(steps)), advice)
        return steps
    chosen = generator.sample(range(len(table["steps"])), 6)
    return [table["steps"][index] for index in sorted(chosen)]


def with_number(text: str, words: dict[str, str], generator: random.Random) -> str:
    """Fill a wording's fields; {n} becomes a new number each time."""
    return text.format_map({**words, "n": str(generator.choice([2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30]))})


def numbered(steps: Sequence[str]) -> str:
    """Return steps as a numbered list."""
    return "\n".join(f"{number}. {capitalized(step)}." for number, step in enumerate(steps, start=1))


def prose(texts: dict[str, Any], steps: Sequence[str], generator: random.Random) -> str:
    """Return steps as running text: first, then, finally."""
    sentences = []
    for index, step in enumerate(steps):
        words = texts["first" if index == 0 else "last" if index == len(steps) - 1 else "next"]
        bare = 0 < index < len(steps) - 1 and generator.random() < 0.5
        sentences.append(f"{capitalized(step)}." if bare else f"{generator.choice(words)}, {step}.")
    return " ".join(sentences)
