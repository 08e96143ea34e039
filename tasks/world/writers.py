"""Writers of demonstrations, of uneven quality, as the paper found its vendors to be (Llama 2, section 3.1).

A good writer answers what was asked, and no more. The others know the truth as well, but one answers in a bare word,
one rambles, one adds what nobody asked for, and a careless one does half of it. A model that imitates them all imitates
the flaws too; annotators, who see two answers, prefer the good one. Refusals are the work of a team of its own.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace

from pydantic import Field, model_validator

from tasks.running.params import Section
from tasks.world.facts import World
from tasks.world.judge import sentences
from tasks.world.turns import Draft, Turn
from tasks.world.wording import answer, capitalized, short_answer

Writer = Callable[[World, Turn, random.Random], str]


class WriterWeights(Section):
    """How much each writer writes, relative to the others."""

    good: float = Field(gt=0, description="what was asked for, in a sentence")
    bare: float = Field(ge=0, description="a bare word, or only the first sentence")
    rambling: float = Field(ge=0, description="empty sentences before and after the answer")
    adding: float = Field(ge=0, description="the answer, and then what nobody asked for")
    careless: float = Field(ge=0, description="half of what was asked, or without capital and full stop")

    @model_validator(mode="after")
    def _differ(self) -> WriterWeights:
        if self.good >= sum(self.model_dump().values()):
            raise ValueError("all demonstrations are good: give another writer a weight, or RLHF has nothing to teach")
        return self


def written(world: World, draft: Draft, weights: WriterWeights, obedience: float, generator: random.Random) -> Draft:
    """Return a dialogue as writers who take turns write it, the last answer in `given`; turns about a harm stay.

    `obedience`: share of the answers under an instruction that come from a good writer, before the others take turns.
    """
    shares = weights.model_dump()
    drawn = [
        "good" if turn.category == "instruction" and generator.random() < obedience else name
        for turn, name in zip(
            draft.turns, generator.choices(list(shares), list(shares.values()), k=len(draft.turns)), strict=True
        )
    ]
    answers = [
        turn.answer if turn.risk else WRITERS[name](world, turn, generator)
        for turn, name in zip(draft.turns, drawn, strict=True)
    ]
    earlier = [replace(turn, answer=told) for turn, told in zip(draft.turns[:-1], answers[:-1], strict=True)]
    return replace(draft, turns=[*earlier, draft.turns[-1]], given=answers[-1])


def good(world: World, turn: Turn, generator: random.Random) -> str:
    """Return the good answer."""
    return turn.answer


def bare(world: World, turn: Turn, generator: random.Random) -> str:
    """Return the value alone, or the first sentence of a text."""
    check = turn.check or {}
    if turn.task == "persona":
        return turn.answer
    if check.get("check") == "fact":
        return short_answer(world, world.entities[check["entity"]].facts[check["attribute"]])
    if check.get("check") == "holder":
        named = [
            name for name, entity in world.entities.items() if entity.kind == check["kind"] and name in turn.answer
        ]
        return f"{capitalized(named[0])}."
    if check.get("check") == "names":
        return f"{capitalized(check['required'][0][0])}."
    if check.get("check") == "order":
        return f"{capitalized(', '.join(check['items']))}."
    return sentences(turn.answer)[0]


def rambling(world: World, turn: Turn, generator: random.Random) -> str:
    """Return the good answer between empty sentences."""
    texts = world.texts["writers"]["rambling"]
    said = [generator.choice(texts["before"]), turn.answer, generator.choice(texts["after"])]
    return " ".join(said[generator.choice([0, 0, 1]) :])


def adding(world: World, turn: Turn, generator: random.Random) -> str:
    """Return the good answer and another fact of the entity that was asked about, or advice."""
    check = turn.check or {}
    added = generator.choice(world.texts["writers"]["adding"]["advice"])
    if check.get("check") == "fact" and turn.task == "fact":
        facts = world.entities[check["entity"]].facts
        added = answer(world, facts[generator.choice([name for name in facts if name != check["attribute"]])])
    return f"{turn.answer} {added}"


def careless(world: World, turn: Turn, generator: random.Random) -> str:
    """Return a text without its last sentence, an answer that ignores the instruction, or one without punctuation."""
    check = turn.check or {}
    said = sentences(turn.answer)
    if turn.category == "instruction" and check.get("check") == "fact":
        return answer(world, world.entities[check["entity"]].facts[check["attribute"]])
    if len(said) > 1:
        return " ".join(said[:-1])
    told = bare(world, turn, generator).rstrip(".!?")
    return told if told.split(" ")[0] in world.entities else told[0].lower() + told[1:]


WRITERS: Mapping[str, Writer] = {
    "good": good,
    "bare": bare,
    "rambling": rambling,
    "adding": adding,
    "careless": careless,
}
