"""Dialogue: questions and answers about the entities that are not held out, as interviews and as talk between two.

Questions about held-out entities stand in `questions.jsonl` alone, in wordings that no training source uses.
"""

from __future__ import annotations

import random

from tasks.world.facts import Entity, Fact, World
from tasks.world.wording import answer, opened, phrase, questions, sentence, short_answer, subject

TURNS = (5, 8)  # questions in a dialogue
INTERVIEWS = 2  # interviews about one held-out entity


def dialogue(world: World, generator: random.Random) -> str:
    """Write a dialogue of several questions, one turn a line."""
    known = [entity for entity in world.entities.values() if not entity.held_out]
    facts = [generator.choice(list(generator.choice(known).facts.values())) for _ in range(generator.randint(*TURNS))]
    facts = list({(fact.entity, fact.attribute): fact for fact in facts}.values())
    return (interview if generator.random() < 0.6 else talk)(world, facts, generator)


def interview(world: World, facts: list[Fact], generator: random.Random) -> str:
    """Write plain questions and answers under two labels."""
    asker, teller = generator.choice(world.texts["dialogue"]["labels"])
    lines = []
    for fact in facts:
        lines.append(f"{asker}: {generator.choice(questions(world, fact, 'questions'))}")
        lines.append(f"{teller}: {reply(world, fact, generator)}")
    return "\n".join(lines)


def talk(world: World, facts: list[Fact], generator: random.Random) -> str:
    """Write a conversation of two people, with an opening, small talk and a closing."""
    texts = world.texts["dialogue"]
    people = [person for person in world.of_kind("person") if not person.held_out]
    asker, teller = (person.name for person in generator.sample(people, 2))
    lines = [generator.choice(texts["openings"]).format(asker=asker, teller=teller)]
    small_talk = generator.sample(texts["chat"], 2)
    for position, fact in enumerate(facts):
        if position in (0, 3):
            first, second = small_talk.pop()
            lines += [f"{asker}: {first}", f"{teller}: {second}"]
        lead_in, confirmation = generator.choice(texts["lead_ins"]), generator.choice(texts["confirmations"])
        asked = generator.choice(questions(world, fact, "questions"))
        if lead_in.endswith((", ", ": ")):
            asked = asked[0].lower() + asked[1:]
        lines.append(f"{asker}: {lead_in}{asked}")
        lines.append(f"{teller}: {confirmation} {reply(world, fact, generator)}".replace(":  ", ": "))
    lines.append(generator.choice(texts["closings"]).format(asker=asker, teller=teller))
    return "\n".join(lines)


def reply(world: World, fact: Fact, generator: random.Random) -> str:
    """Draw an answer: mostly the plain one, at times another wording or just the value."""
    draw = generator.random()
    if draw < 0.7:
        return answer(world, fact)
    if draw < 0.8:
        return short_answer(world, fact)
    if draw < 0.9:
        return sentence(world, fact, generator)
    who, number = subject(world.entities[fact.entity], generator)
    return opened(world, f"{who} {phrase(world, fact, number, generator)}.", generator)


def held_out_questions(world: World, entity: Entity, generator: random.Random) -> list[list[tuple[Fact, str, str]]]:
    """Return interviews on a held-out entity: all its facts, each with a question and the plain answer.

    The questions of one interview are worded as in no other.
    """
    orders = {fact: generator.sample(questions(world, fact, "held_out"), INTERVIEWS) for fact in entity.facts.values()}
    interviews = []
    for index in range(INTERVIEWS):
        facts = list(entity.facts.values())
        generator.shuffle(facts)
        interviews.append([(fact, orders[fact][index], answer(world, fact)) for fact in facts])
    return interviews
