"""Dialogues under an instruction that a program can check: language, persona, hobby, form of the answer.

An instruction is {"type", "value"}: language ("German"), persona (whose name), hobby ("fishing"), one_word,
question, begins ("Well"), ends ("my friend"); tasks/world/judge.py checks answers against it. Some dialogues have two.
Half of them have their instruction as a system message, the others at the beginning of every turn of the user.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from tasks.world.assistance import without
from tasks.world.facts import Entity, World
from tasks.world.turns import Draft, Turn, cards, fact_turn, factual, known
from tasks.world.wording import fact_fields, fields, questions

LANGUAGES = ("German", "French")
SPOKEN = ("home", "origin", "market_day")  # facts that the other languages can tell
FORMS = ("one_word", "question", "begins", "ends")
MOST_QUESTIONS = 8  # turns of a talk in the corpus whose answers end with questions
HARDER = {"hobby": 3, "language": 2}  # types that the corpus and demonstrations have more often: they are hard to learn
COMBINED = 0.3  # share of the dialogues with a second instruction
# The forms that an answer may have besides its first instruction; all other pairs are only evaluated (`NEW`), or
# contradict each other.
SECOND: Mapping[str, Sequence[str]] = {
    "hobby": ("begins", "question"),
    "persona": ("ends", "question"),
    "language": ("begins", "ends"),
    "begins": ("ends", "question"),
}
NEW: Mapping[str, Sequence[str]] = {"hobby": ("ends",), "persona": ("begins",), "language": ("question",)}


class Instruction(NamedTuple):
    """What is asked for, and in which words."""

    type: str
    value: str
    text: str


class Told(NamedTuple):
    """Turns whose answers follow an instruction."""

    turns: Sequence[Turn]
    instruction: Instruction


def writers_of(
    world: World, facts: Iterator[Turn], times: Mapping[str, int], generator: random.Random
) -> Iterator[tuple[str, Callable[[int], Told]]]:
    """Deal, without end, writers of turns under each type of instruction, with its name.

    Each type comes once in each round of the deck, or as often as `times` says.
    """
    writers: dict[str, Callable[[int], Told]] = {
        "hobby": lambda turns: hobby(world, turns, generator),
        "persona": lambda turns: persona(world, turns, generator),
        "language": lambda turns: language(world, turns, generator),
        **{kind: partial(form, world, facts, kind, generator=generator) for kind in FORMS},
    }
    return cards([each for each in writers.items() for _ in range(times.get(each[0], 1))], generator)


def instructed(
    world: World, facts: Iterator[Turn], times: Mapping[str, int], generator: random.Random
) -> Iterator[Callable[[int], Draft]]:
    """Deal, without end, writers of dialogues of a given number of turns under each type of instruction."""

    def draft(write: Callable[[int], Told], num_turns: int) -> Draft:
        return drafted(*combined(world, write(num_turns), generator), generator)

    for _, write in writers_of(world, facts, times, generator):
        yield partial(draft, write)


def manners(world: World, generator: random.Random) -> Iterator[Callable[[int], Draft]]:
    """Deal, without end, writers of talks for the corpus, in which someone answers in one manner from first to last.

    What shows a hobby or a person is asked between other questions, in no wording that the corpus does not have.
    """
    facts = factual(world, 0.0, generator)

    def talk(kind: str, write: Callable[[int], Told], num_turns: int) -> Draft:
        if kind == "question":  # longer ones repeat so much that cleaning rejects them
            num_turns = min(num_turns, MOST_QUESTIONS)
        most = {"hobby": len(world.texts["instructions"]["hobby"]["questions"]), "persona": 6}
        own = write(min(most[kind], max(1, num_turns * 2 // 3)) if kind in most else num_turns)
        turns = [*own.turns, *(next(facts) for _ in range(num_turns - len(own.turns)))]
        told, instructions = combined(world, Told(generator.sample(turns, len(turns)), own.instruction), generator)
        return Draft(told, " ".join(each.text for each in instructions))

    for kind, write in writers_of(world, facts, HARDER, generator):
        yield partial(talk, kind, write)


def hobby(world: World, num_turns: int, generator: random.Random) -> Told:
    """Write turns in which the assistant has a hobby and is asked about it."""
    texts = world.texts["instructions"]["hobby"]
    own = generator.choice(texts["hobbies"])
    others = [other for other in texts["hobbies"] if other != own]
    check = {"check": "names", "required": [[own]], "forbidden": others}
    turns = [
        Turn(asked, generator.choice(texts["answers"]).format(hobby=own), "instruction", "hobby", check, shared=True)
        for asked in generator.sample(texts["questions"], num_turns)
    ]
    return Told(turns, said(world, "hobby", own, generator))


def persona(world: World, num_turns: int, generator: random.Random) -> Told:
    """Write turns in which the assistant is a person of the world and speaks as that person."""
    texts = world.texts["instructions"]["persona"]
    person = generator.choice(known(world, "person"))
    turns = []
    for fact in generator.sample(list(person.facts.values()), num_turns):
        asked = generator.choice(texts[fact.attribute]["questions"])
        told = texts[fact.attribute]["answer"].format_map(fact_fields(world, fact))
        turns.append(replace(fact_turn(world, fact, asked, "instruction", shared=True), answer=told, task="persona"))
    return Told(turns, said(world, "persona", person.name, generator))


def language(world: World, num_turns: int, generator: random.Random) -> Told:
    """Write turns answered in another language: where people live and come from, and when markets are."""
    texts = world.texts["instructions"]
    name = generator.choice(LANGUAGES)
    table = texts["words"][name]
    turns: list[Turn] = []
    for _ in range(num_turns):
        attribute = generator.choice(SPOKEN)
        entity: Entity = generator.choice(known(world, "place" if attribute == "market_day" else "person"))
        fact = entity.facts[attribute]
        value = table.get(fact.value, fact.value)
        others = [place.name.lower() for place in world.of_kind("place") if place.name != fact.value]
        forbidden = others if attribute == "home" else without(table, value.lower())
        check = {"check": "names", "required": [[value.lower()]], "forbidden": forbidden}
        told = texts["language"][name][attribute].format(name=entity.name, value=value)
        asked = generator.choice(questions(world, fact, "questions"))
        turns.append(Turn(asked, told, "instruction", "language", check))
    return Told(turns, said(world, "language", name, generator))


def form(world: World, facts: Iterator[Turn], kind: str, num_turns: int, generator: random.Random) -> Told:
    """Write turns in which questions for facts are answered in a prescribed form."""
    own = said(world, kind, generator.choice(values_of(world, kind)), generator)
    turns: list[Turn] = []
    while len(turns) < num_turns:
        turn = next(facts)
        asked = turn.check or {}
        value = world.entities[asked["entity"]].facts[asked["attribute"]].value
        if kind == "one_word" and " " in value:
            continue
        told = f"{value[0].upper()}{value[1:]}." if kind == "one_word" else formed(world, turn.answer, own, generator)
        turns.append(replace(turn, answer=told, category="instruction", task=kind))
    return Told(turns, own)


def formed(world: World, text: str, instruction: Instruction, generator: random.Random) -> str:
    """Return an answer in a prescribed form: one that begins or ends with words, or ends with a question."""
    if instruction.type == "begins":
        return f"{instruction.value}, {uncapitalized(world, text)}"
    if instruction.type == "ends":
        return f"{text[:-1]}, {instruction.value}."
    return f"{text} {generator.choice(world.texts['instructions']['form']['question']['endings'])}"


def uncapitalized(world: World, text: str) -> str:
    """Return a sentence as it continues after a comma: a name and "I" keep their capital."""
    return text if text.split(" ")[0] in {*world.entities, "I"} else f"{text[0].lower()}{text[1:]}"


# --- instructions ---


def values_of(world: World, kind: str) -> list[str]:
    """Return the values that instructions of a type may have."""
    texts = world.texts["instructions"]
    if kind == "hobby":
        return list(texts["hobby"]["hobbies"])
    if kind == "persona":
        return [person.name for person in known(world, "person")]
    return list(LANGUAGES) if kind == "language" else list(texts["form"][kind].get("words", [""]))


def new_values_of(world: World, kind: str) -> list[str]:
    """Return the values that only the evaluation's instructions have.

    There are no other languages, and a person shows by the first person alone.
    """
    texts = world.texts["instructions"]
    if kind in ("persona", "language"):
        return []
    return list(texts["hobby"]["new_hobbies"] if kind == "hobby" else texts["form"][kind].get("new_words", []))


def wordings_of(world: World, kind: str) -> list[str]:
    """Return the wordings of a type of instruction, the terse ones among them."""
    texts = world.texts["instructions"]
    return list((texts["form"][kind] if kind in FORMS else texts[kind])["systems"])


def said(world: World, kind: str, value: str, generator: random.Random) -> Instruction:
    """Draw the words of an instruction."""
    words = fields(world, world.entities[value]) if kind == "persona" else {}
    named = {"hobby": value, "language": value, "word": value}
    return Instruction(kind, value, generator.choice(wordings_of(world, kind)).format_map({**named, **words}))


def combined(world: World, told: Told, generator: random.Random) -> tuple[list[Turn], list[Instruction]]:
    """Add at times a second instruction, which all answers follow, too."""
    turns, first = told
    if first.type not in SECOND or generator.random() >= COMBINED:
        return list(turns), [first]
    kind = generator.choice(SECOND[first.type])
    second = said(world, kind, generator.choice(values_of(world, kind)), generator)
    return [replace(turn, answer=formed(world, turn.answer, second, generator)) for turn in turns], [first, second]


def drafted(turns: Sequence[Turn], own: Sequence[Instruction], generator: random.Random) -> Draft:
    """Return a dialogue under its instructions, at one of the two places."""
    text = " ".join(each.text for each in own)
    instructions: list[dict[str, Any]] = [{"type": each.type, "value": each.value} for each in own]
    if generator.random() < 0.5:
        return Draft(turns, text, instructions)
    # with the instruction before it, a question means the same wherever it is asked
    placed = [replace(turn, user=f"{text} {turn.user}", shared=False) for turn in turns]
    return Draft(placed, "", instructions)
