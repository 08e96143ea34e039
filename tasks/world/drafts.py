"""Endless streams of dialogues, one for each part of a split."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from tasks.world.adversarial import (
    ATTACKS,
    HARMLESS,
    Topic,
    adversarial,
    combined,
    committed,
    deed,
    direct,
    insisted,
    topics,
)
from tasks.world.assistance import language_assistance, writing
from tasks.world.facts import World
from tasks.world.instructions import HARDER, instructed
from tasks.world.sizes import Dialogues
from tasks.world.turns import Draft, Turn, cards, conversation, factual, opening, recommendation

PROMPTED = ("harms", "facts", "borderline")  # what demonstrations under a safety pre-prompt are about


def drafts_of(
    world: World, params: Dialogues, part: str, demonstrated: bool, generator: random.Random
) -> Iterator[Draft]:
    """Draw an endless stream of helpful dialogues of one part: a category, `borderline`, or `instruction`.

    What is demonstrated has no refusal before what only looks unsafe, and more of the instructions that are hard to
    learn.
    """
    if part == "borderline":
        return borderline_drafts(world, params, not demonstrated, generator)
    if part == "instruction":
        return instructed_drafts(world, params, HARDER if demonstrated else {}, generator)
    return plain_drafts(world, params, part, generator)


def plain_drafts(world: World, params: Dialogues, category: str, generator: random.Random) -> Iterator[Draft]:
    """Draw an endless stream of helpful dialogues of one category, without system message."""
    facts = factual(world, params.new_wording_share, generator)
    makers: Mapping[str, Callable[[], list[Turn]]] = {
        "factual": lambda: [deed(world, "plain", generator) if generator.random() < params.deed_share else next(facts)],
        "writing": lambda: [writing(world, generator)],
        "language_assistance": lambda: [language_assistance(world, generator)],
        "recommendation": lambda: [recommendation(world, generator)],
        "dialogue": lambda: conversation(world, facts, generator),
    }
    earlier = [name for name in makers if name != "dialogue"]
    while True:
        turns = makers[category]()
        if len(turns) == 1 and generator.random() < params.multi_turn_share:
            for _ in range(generator.choice([1, 1, 2])):
                turns = [*makers[generator.choice(earlier)](), *turns]
            if generator.random() < 0.25:
                turns[0] = opening(world, generator)
        yield Draft(turns)


def borderline_drafts(
    world: World, params: Dialogues, after_refusal: bool, generator: random.Random
) -> Iterator[Draft]:
    """Draw an endless stream of dialogues whose last turn looks unsafe and is not, some after a refused harm."""
    facts = factual(world, params.new_wording_share, generator)
    harms = adversarial(world, lambda topic: True, ATTACKS, generator)
    while True:
        before = []
        if generator.random() < params.multi_turn_share:
            before = [next(harms if after_refusal and generator.random() < 0.5 else facts)]
        yield Draft([*before, deed(world, "borderline", generator)])


def instructed_drafts(
    world: World, params: Dialogues, times: Mapping[str, int], generator: random.Random
) -> Iterator[Draft]:
    """Draw an endless stream of dialogues under an instruction; `times`: how often its types come, if not once."""
    for write in instructed(world, factual(world, params.new_wording_share, generator), times, generator):
        yield write(generator.choice([2, 3]) if generator.random() < params.multi_turn_share else 1)


def harmful_drafts(
    world: World,
    params: Dialogues,
    allowed: Callable[[Topic], bool],
    attacks: Sequence[str],
    difficulty: int,
    generator: random.Random,
) -> Iterator[Draft]:
    """Draw an endless stream of adversarial dialogues of one difficulty.

    Of the first some come after a harmless turn, or ask again after a refusal.
    """
    facts = factual(world, params.new_wording_share, generator)
    subjects = {(topic.risk, topic.name): topic for topic in topics(world)}
    kinds = cards(["before", "again"], generator)
    for turn in adversarial(world, allowed, attacks, generator):
        harm = subjects[turn.risk, turn.topic]
        turns = [turn]
        if difficulty == 1 and generator.random() < params.multi_turn_share:
            turns = [next(facts), turn] if next(kinds) == "before" else [turn, insisted(world, turn, generator)]
        elif difficulty == 2:
            turns = [combined(world, harm, turn.attack, generator)]
        elif difficulty >= 3:
            lull = [deed(world, generator.choice(HARMLESS), generator) for _ in range(generator.choice([1, 2]))]
            turns = [*lull, direct(world, harm, generator)]
        if difficulty == 4:
            turns = [committed(world, generator), *turns]
        yield Draft(turns, difficulty=difficulty)


def preprompted_drafts(
    world: World, params: Dialogues, about: str, safe_topics: Sequence[Topic], generator: random.Random
) -> Iterator[Draft]:
    """Draw an endless stream of dialogues under a safety pre-prompt: harms are refused, the others answered."""
    texts = world.texts["safety"]["preprompts"]
    harms = harmful_drafts(world, params, safe_topics.__contains__, params.safe_attacks, 1, generator)
    facts = factual(world, params.new_wording_share, generator)
    while True:
        if about == "harms":
            draft = next(harms)
        else:
            draft = Draft([next(facts) if about == "facts" else deed(world, "borderline", generator)])
        first, second = generator.sample(texts["adjectives"], 2)
        yield replace(draft, system=generator.choice(texts["frames"]).format(first=first, second=second))
