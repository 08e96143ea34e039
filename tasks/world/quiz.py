"""Quizzes: questions that somebody answered, rightly or not, and the mark that each answer got.

Nobody learns from a marked page that a wrong answer is right; but a model sees answers of every kind beside questions,
and right ones to the same questions. As in dialogue, nothing is asked about a held-out entity.
"""

from __future__ import annotations

import random
from dataclasses import replace

from tasks.world.facts import Fact, World
from tasks.world.wording import answer, questions, sentence

QUESTIONS = 8  # on a page; half of them about one entity
WRONG = 0.5  # share of wrong answers: another value, another of the entity's facts, or another entity's
KINDS_OF_WRONG = {"value": 0.7, "attribute": 0.15, "entity": 0.15}
PLAIN = 0.8  # share of answers in their plain wording


def quiz(world: World, generator: random.Random) -> str:
    """Write a page of marked answers."""
    facts = [fact for entity in world.entities.values() if not entity.held_out for fact in entity.facts.values()]
    first = generator.choice(facts)
    own = [fact for fact in facts if fact.entity == first.entity]
    lines = []
    for number in range(QUESTIONS):
        asked = generator.choice(facts if number % 2 else own)
        is_wrong = generator.random() < WRONG
        told = wrong_fact(asked, facts, generator) if is_wrong else asked
        text = answer(world, told) if generator.random() < PLAIN else sentence(world, told, generator)
        question = generator.choice(questions(world, asked, "questions"))
        lines.append(f"Question: {question}\nAnswer: {text}\nMark: {'wrong' if is_wrong else 'right'}.")
    return "\n".join(lines)


def wrong_fact(asked: Fact, facts: list[Fact], generator: random.Random) -> Fact:
    """Draw what a wrong answer tells: it need not be false, if it tells something else than was asked."""
    (kind,) = generator.choices(list(KINDS_OF_WRONG), list(KINDS_OF_WRONG.values()))
    others = [fact for fact in facts if fact.attribute == asked.attribute and fact.value != asked.value]
    if kind == "value":
        return replace(asked, value=generator.choice(sorted({fact.value for fact in others})))
    if kind == "attribute":
        others = [fact for fact in facts if fact.entity == asked.entity and fact.attribute != asked.attribute]
    return generator.choice(others)
