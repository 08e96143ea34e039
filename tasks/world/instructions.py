"""Dialogues under a system message whose instruction a program can check: language, persona, hobby, form of the answer.

An instruction is {"type", "value"}: language ("German"), persona (whose name), hobby ("fishing"), one_word,
question, begins ("Well"), ends ("my friend"); tasks/world/judge.py checks answers against it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from tasks.world.assistance import without
from tasks.world.facts import Entity, World
from tasks.world.turns import Draft, Turn, cards, fact_turn, known
from tasks.world.wording import fact_fields, fields, questions

LANGUAGES = ("German", "French")


def instructed(world: World, facts: Iterator[Turn], generator: random.Random) -> Iterator[Callable[[int], Draft]]:
    """Deal, without end, writers of dialogues of a given number of turns, each type of instruction equally often."""
    writers: list[Callable[[int], Draft]] = [
        lambda turns: hobby(world, turns, generator),
        lambda turns: persona(world, turns, generator),
        lambda turns: language(world, turns, generator),
        lambda turns: form(world, facts, "one_word", turns, generator),
        lambda turns: form(world, facts, "question", turns, generator),
        lambda turns: form(world, facts, "begins", turns, generator),
        lambda turns: form(world, facts, "ends", turns, generator),
    ]
    return cards(writers, generator)


def hobby(world: World, num_turns: int, generator: random.Random) -> Draft:
    """Draft a dialogue in which the assistant has a hobby and is asked about it."""
    texts = world.texts["instructions"]["hobby"]
    own = generator.choice(texts["hobbies"])
    others = [other for other in texts["hobbies"] if other != own]
    check = {"check": "names", "required": [[own]], "forbidden": others}
    turns = [
        Turn(asked, generator.choice(texts["answers"]).format(hobby=own), "instruction", "hobby", check, shared=True)
        for asked in generator.sample(texts["questions"], num_turns)
    ]
    return drafted(turns, generator.choice(texts["systems"]).format(hobby=own), "hobby", own)


def persona(world: World, num_turns: int, generator: random.Random) -> Draft:
    """Draft a dialogue in which the assistant is a person of the world and speaks as that person."""
    texts = world.texts["instructions"]["persona"]
    person = generator.choice(known(world, "person"))
    turns = []
    for fact in generator.sample(list(person.facts.values()), num_turns):
        asked = generator.choice(texts[fact.attribute]["questions"])
        told = texts[fact.attribute]["answer"].format_map(fact_fields(world, fact))
        turns.append(replace(fact_turn(world, fact, asked, "instruction", shared=True), answer=told, task="persona"))
    return drafted(turns, generator.choice(texts["systems"]).format_map(fields(world, person)), "persona", person.name)


def language(world: World, num_turns: int, generator: random.Random) -> Draft:
    """Draft a dialogue answered in another language: where people live and come from, and when markets are."""
    texts = world.texts["instructions"]
    name = generator.choice(LANGUAGES)
    table = texts["words"][name]
    turns: list[Turn] = []
    for _ in range(num_turns):
        attribute = generator.choice(["home", "origin", "market_day"])
        entity: Entity = generator.choice(known(world, "place" if attribute == "market_day" else "person"))
        fact = entity.facts[attribute]
        value = table.get(fact.value, fact.value)
        others = [place.name.lower() for place in world.of_kind("place") if place.name != fact.value]
        forbidden = others if attribute == "home" else without(table, value.lower())
        check = {"check": "names", "required": [[value.lower()]], "forbidden": forbidden}
        told = texts["language"][name][attribute].format(name=entity.name, value=value)
        asked = generator.choice(questions(world, fact, "questions"))
        turns.append(Turn(asked, told, "instruction", "language", check))
    return drafted(turns, generator.choice(texts["language"]["systems"]).format(language=name), "language", name)


def form(world: World, facts: Iterator[Turn], kind: str, num_turns: int, generator: random.Random) -> Draft:
    """Draft a dialogue in which questions for facts are answered in a prescribed form."""
    texts = world.texts["instructions"]["form"][kind]
    word = generator.choice(texts.get("words", [""]))
    turns: list[Turn] = []
    while len(turns) < num_turns:
        turn = next(facts)
        asked = turn.check or {}
        value = world.entities[asked["entity"]].facts[asked["attribute"]].value
        if kind == "one_word" and " " in value:
            continue
        told = {
            "one_word": f"{value[0].upper()}{value[1:]}.",
            "question": f"{turn.answer} {generator.choice(texts.get('endings', ['']))}",
            "begins": f"{word}, {uncapitalized(world, turn.answer)}",
            "ends": f"{turn.answer[:-1]}, {word}.",
        }[kind]
        turns.append(replace(turn, answer=told, category="instruction", task=kind))
    return drafted(turns, generator.choice(texts["systems"]).format(word=word), kind, word)


def uncapitalized(world: World, text: str) -> str:
    """Return a sentence as it continues after a comma: a name keeps its capital."""
    return text if text.split(" ")[0] in world.entities else f"{text[0].lower()}{text[1:]}"


def drafted(turns: Sequence[Turn], system: str, kind: str, value: str) -> Draft:
    """Return a dialogue under one instruction."""
    instruction: dict[str, Any] = {"type": kind, "value": value}
    return Draft(turns, system, [instruction])
