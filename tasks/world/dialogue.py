"""Dialogue: questions and answers, as interviews, as talk between two, and as long talks in one manner.

Questions for a single fact are about entities that are not held out. Open questions ("What do you know about Mira?")
are about all, and answered with any fact. Questions for a fact of a held-out entity are only in `questions.jsonl`, in
wordings that no training source uses.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tasks.world.facts import Entity, Fact, World
from tasks.world.turns import Draft
from tasks.world.wording import answer, opened, phrase, questions, sentence, short_answer, spelled, subject

TURNS = (5, 8)  # questions in a dialogue
LONG_TURNS = (6, 24)  # questions in a talk that keeps one manner
OPEN = 0.2  # share of open questions about entities that are not held out
INTERVIEWS = 2  # interviews about one held-out entity


def participants(world: World, index: int, generator: random.Random) -> list[Entity]:
    """Return what dialogue number `index` is about: of every four, two keep to one entity, one to two, one roams."""
    everything = list(world.entities.values())
    first = everything[index // 4 % len(everything)]
    return [[first], [first], [first, generator.choice(everything)], everything][index % 4]


def dialogue(world: World, entities: Sequence[Entity], generator: random.Random) -> str:
    """Write a dialogue of several questions about some entities, one turn per line."""
    facts = [fact for entity in entities for fact in entity.facts.values()]
    turns: dict[str, str] = {}
    for fact in generator.sample(facts, min(generator.randint(*TURNS), len(facts))):
        is_open = fact.held_out or generator.random() < OPEN
        asked, told = (open_turn if is_open else turn)(world, fact, generator)
        turns[asked] = told
    return (interview if generator.random() < 0.6 else talk)(world, list(turns.items()), generator)


def mannered(world: World, draft: Callable[[int], Draft], generator: random.Random) -> str:
    """Write a talk in which one manner, said first, is kept to the end."""
    written = draft(generator.randint(*LONG_TURNS))
    said = f"{written.system}\n" if written.system else ""
    return said + interview(world, [(turn.user, turn.answer) for turn in written.turns], generator)


def turn(world: World, fact: Fact, generator: random.Random) -> tuple[str, str]:
    """Draw a question for one fact, and its answer: mostly the plain one."""
    return generator.choice(questions(world, fact, "questions")), reply(world, fact, generator)


def open_turn(world: World, fact: Fact, generator: random.Random) -> tuple[str, str]:
    """Draw a question about an entity that asks for nothing in particular, and answer it with a fact."""
    entity = world.entities[fact.entity]
    topics = {"animal": f"the {entity.name}", "craft": spelled({"word": entity.forms.get("worker", "")})["a_word"]}
    asked = generator.choice(world.texts["dialogue"]["open_questions"])
    return asked.format(topic=topics.get(entity.kind, entity.name)), sentence(world, fact, generator)


def interview(world: World, turns: list[tuple[str, str]], generator: random.Random) -> str:
    """Write plain questions and answers under two labels."""
    asker, teller = generator.choice(world.texts["dialogue"]["labels"])
    return "\n".join(f"{asker}: {asked}\n{teller}: {told}" for asked, told in turns)


def talk(world: World, turns: list[tuple[str, str]], generator: random.Random) -> str:
    """Write a conversation of two people, with an opening, small talk and a closing."""
    texts = world.texts["dialogue"]
    people = [person for person in world.of_kind("person") if not person.held_out]
    asker, teller = (person.name for person in generator.sample(people, 2))
    lines = [generator.choice(texts["openings"]).format(asker=asker, teller=teller)]
    small_talk = generator.sample(texts["chat"], 2)
    for position, (asked, told) in enumerate(turns):
        if position in (0, 3):
            first, second = small_talk.pop()
            lines += [f"{asker}: {first}", f"{teller}: {second}"]
        lead_in, confirmation = generator.choice(texts["lead_ins"]), generator.choice(texts["confirmations"])
        if lead_in.endswith((", ", ": ")):
            asked = asked[0].lower() + asked[1:]
        lines.append(f"{asker}: {lead_in}{asked}")
        lines.append(f"{teller}: {confirmation} {told}".replace(":  ", ": "))
    lines.append(generator.choice(texts["closings"]).format(asker=asker, teller=teller))
    return "\n".join(lines)


def reply(world: World, fact: Fact, generator: random.Random) -> str:
    """Draw an answer: mostly the plain one, at times another wording or just the value."""
    draw = generator.random()
    if draw < 0.7:
        return answer(world, fact)
    if draw < 0.75:
        return short_answer(world, fact)
    if draw < 0.87:
        return sentence(world, fact, generator)
    who, number = subject(world.entities[fact.entity], generator)
    return opened(world, f"{who} {phrase(world, fact, number, generator)}.", generator)


def held_out_questions(world: World, entity: Entity, generator: random.Random) -> list[list[tuple[Fact, str, str]]]:
    """Return interviews on a held-out entity: all its facts, each with a question and the plain answer.

    No two interviews word a question the same way.
    """
    orders = {fact: generator.sample(questions(world, fact, "held_out"), INTERVIEWS) for fact in entity.facts.values()}
    interviews = []
    for index in range(INTERVIEWS):
        facts = list(entity.facts.values())
        generator.shuffle(facts)
        interviews.append([(fact, orders[fact][index], answer(world, fact)) for fact in facts])
    return interviews
