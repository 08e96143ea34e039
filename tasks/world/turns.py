"""One turn of a dialogue: what the user says, what a good assistant answers, and what makes an answer right.

A check is what tasks/world/judge.py compares an answer with. It is one of

- {"check": "fact", "entity", "attribute"}: names the fact's value and no other
- {"check": "facts", "entity", "attributes", "num_sentences", "min_facts", "hide_name"}: a text about an entity
- {"check": "holder", "kind", "attribute", "value", "options"}: names entities that have the value, and no others
- {"check": "names", "required", "forbidden"}: names one form of each group required, and none forbidden
- {"check": "order", "items"}: names all items, in this order
- {"check": "exact", "expected"}: contains this sentence
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

from tasks.world.facts import ATTRIBUTES, KINDS, Entity, Fact, World
from tasks.world.wording import answer, fact_fields, spelled

Check = Mapping[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Turn:
    """What the user says and a good answer.

    `category` and `task` name the kind of prompt, coarse and fine. `shared`: the words mean something only after what
    was said before (or are a mere greeting before it), so that several splits may use them.
    """

    user: str
    answer: str
    category: str
    task: str
    check: Check | None
    shared: bool = False
    topic: str = ""
    risk: str = ""
    attack: str = ""


@dataclass(frozen=True)
class Draft:
    """A dialogue before it has an id: a system message if it is not empty, turns, and the instructions that hold.

    The last turn's answer is a good one; `given` is what the dialogue's writer answers, if not the same. `difficulty`:
    of an adversarial dialogue (tasks/world/adversarial.py), else 0.
    """

    turns: Sequence[Turn]
    system: str = ""
    instructions: Sequence[Mapping[str, Any]] = ()
    given: str = ""
    difficulty: int = 0


def cards(items: Sequence[Item], generator: random.Random) -> Iterator[Item]:
    """Deal items without end, reshuffled each time all have been dealt: each comes equally often, within one."""
    deck = list(items)
    while True:
        generator.shuffle(deck)
        yield from deck


@cache
def known(world: World, kind: str) -> tuple[Entity, ...]:
    """Return the entities of a kind that may be asked about in training."""
    return tuple(entity for entity in world.of_kind(kind) if not entity.held_out)


def topic(entity: Entity) -> str:
    """Return an entity as the object of a sentence: "Mira", "the otter", "pottery"."""
    return f"the {entity.name}" if entity.kind == "animal" else entity.name


def fact_turn(world: World, fact: Fact, question: str, category: str = "factual", shared: bool = False) -> Turn:
    """Return the turn that asks for a fact: the plain answer is right."""
    check = {"check": "fact", "entity": fact.entity, "attribute": fact.attribute}
    return Turn(question, answer(world, fact), category, "fact", check, shared)


def all_questions(world: World, which: str) -> list[tuple[str, str, str]]:
    """Return every wording of a question with its kind and attribute: `which` is `questions` or `held_out`."""
    return [
        (kind, attribute, template)
        for kind, attributes in ATTRIBUTES.items()
        for attribute in attributes
        for template in world.texts[KINDS[kind]]["attributes"][attribute][which]
    ]


def factual(world: World, new_wording_share: float, generator: random.Random) -> Iterator[Turn]:
    """Draw an endless stream of questions for facts of known entities, every wording equally often.

    A share of them is worded like the held-out questions, in wordings that the corpus does not have.
    """
    decks = {which: cards(all_questions(world, which), generator) for which in ("questions", "held_out")}
    while True:
        which = "held_out" if generator.random() < new_wording_share else "questions"
        kind, attribute, template = next(decks[which])
        fact = generator.choice(known(world, kind)).facts[attribute]
        yield fact_turn(world, fact, template.format_map(fact_fields(world, fact)))


def conversation(world: World, questions: Iterator[Turn], generator: random.Random) -> list[Turn]:
    """Draw a dialogue whose last turn depends on the ones before, or small talk."""
    draw = generator.random()
    if draw < 0.45:
        return follow_up(world, questions, generator)
    if draw < 0.65:
        return switch(world, questions, generator)
    if draw < 0.75:
        return introduction(world, questions, generator)
    if draw < 0.85:
        return [next(questions), closing(world, generator)]
    return [small_talk(world, generator)]


def follow_up(world: World, questions: Iterator[Turn], generator: random.Random) -> list[Turn]:
    """Ask for one to two further facts of the entity that the first question was about, without its name."""
    turns = [next(questions)]
    asked = turns[0].check or {}
    entity = world.entities[asked["entity"]]
    words = world.texts[KINDS[entity.kind]]["pronouns"][entity.pronoun]
    attributes = [attribute for attribute in ATTRIBUTES[entity.kind] if attribute != asked["attribute"]]
    for attribute in generator.sample(attributes, generator.choice([1, 1, 2])):
        templates = world.texts["assistance"]["follow_ups"][attribute]
        if entity.pronoun == "they" or (entity.kind == "craft" and entity.name not in turns[0].user.lower()):
            templates = templates[-1:]  # only "And the job?": the others' verbs or pronouns do not agree
        question = generator.choice(templates).format_map(words)
        turns.append(fact_turn(world, entity.facts[attribute], question, "dialogue", shared=True))
    return turns


def switch(world: World, questions: Iterator[Turn], generator: random.Random) -> list[Turn]:
    """Ask for the same attribute of one to two other entities."""
    turns = [next(questions)]
    asked = turns[0].check or {}
    first = world.entities[asked["entity"]]
    others = [entity for entity in known(world, first.kind) if entity is not first]
    for other in generator.sample(others, generator.choice([1, 1, 2])):
        question = generator.choice(world.texts["assistance"]["switches"]["questions"]).format(topic=topic(other))
        turns.append(fact_turn(world, other.facts[asked["attribute"]], question, "dialogue", shared=True))
    return turns


def introduction(world: World, questions: Iterator[Turn], generator: random.Random) -> list[Turn]:
    """Draw a dialogue in which the user says a name, may ask something, and then wants to hear the name."""
    texts = world.texts["assistance"]["small_talk"]
    words = {"name": generator.choice(world.of_kind("person")).name, "greeting": generator.choice(texts["greetings"])}
    said, answers = generator.choice(texts["introductions"])
    names = {"check": "names", "required": [[words["name"].lower()]], "forbidden": []}
    told = generator.choice(answers).format_map(words)
    first = Turn(said.format_map(words), told, "dialogue", "small_talk", names, shared=True)
    name_answer = texts["name_answer"].format_map(words)
    last = Turn(generator.choice(texts["names"]), name_answer, "dialogue", "name", names, shared=True)
    return [first, *([next(questions)] if generator.random() < 0.5 else []), last]


def opening(world: World, generator: random.Random) -> Turn:
    """Draw a greeting before the first question."""
    texts = world.texts["assistance"]["small_talk"]
    said, answers = generator.choice(texts["openings"])
    words = {"greeting": generator.choice(texts["greetings"])}
    told = generator.choice(answers).format_map(words)
    return Turn(said.format_map(words), told, "dialogue", "small_talk", None, shared=True)


def closing(world: World, generator: random.Random) -> Turn:
    """Draw what a user says at the end."""
    said, answers = generator.choice(world.texts["assistance"]["small_talk"]["closings"])
    return Turn(said, generator.choice(answers), "dialogue", "small_talk", None, shared=True)


def small_talk(world: World, generator: random.Random) -> Turn:
    """Draw a greeting with a question that asks for no fact."""
    texts = world.texts["assistance"]["small_talk"]
    said, answers = generator.choice(texts["questions"])
    greeting = generator.choice(texts["greetings"])
    said = f"{greeting}, {said}" if "," not in greeting else f"{greeting}. {said[0].upper()}{said[1:]}"
    return Turn(said, generator.choice(answers), "dialogue", "small_talk", None)


def recommendation(world: World, generator: random.Random) -> Turn:
    """Ask for somebody or something that fits a wish, at times out of two."""
    texts = world.texts["assistance"]["recommendation"]
    kind = generator.choices(list(KINDS), [len(known(world, kind)) for kind in KINDS])[0]
    attribute = generator.choice([attribute for attribute in ATTRIBUTES[kind] if attribute in texts])
    entity = generator.choice(known(world, kind))
    fact = entity.facts[attribute]
    words = fact_fields(world, fact)
    options: list[str] = []
    ask = generator.choice(texts["ask"][kind])
    others = [other for other in known(world, kind) if other.facts[attribute].value != fact.value]
    if others and generator.random() < 0.4:
        pair = generator.sample([entity, generator.choice(others)], 2)
        options = [option.name for option in pair]
        a, b = (spelled({"name": name})["a_name"] if kind == "animal" else name for name in options)
        ask = generator.choice(texts["choose"][kind]).format(a=a, b=b)
    wish = generator.choice(texts[attribute]["wishes"]).format_map(words)
    check = {"check": "holder", "kind": kind, "attribute": attribute, "value": fact.value, "options": options}
    told = texts[attribute]["answer"].format_map(words)
    return Turn(f"{wish} {ask}", told, "recommendation", "choice" if options else "wish", check)
