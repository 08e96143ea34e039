"""Conversations of many turns, and instructions that are to hold in all of them (Llama 2, section 3.3).

The ones for training have no instruction: stage `ghost_attention` gives them some, of those in instructions.json.
The evaluation's come with theirs. Some of these are like the ones in training, some have values that no training has
(another hobby), some are pairs of types that are never combined there. An instruction shows only where it is asked for:
a hobby where the user asks what the assistant likes, another language where the world has words for the answer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from tasks.running.digests import number_of
from tasks.world.facts import World
from tasks.world.instructions import (
    FORMS,
    NEW,
    SECOND,
    SPOKEN,
    Instruction,
    new_values_of,
    said,
    values_of,
    wordings_of,
)
from tasks.world.judge import LANGUAGE_WORDS, normalized
from tasks.world.turns import Draft, Turn, cards, fact_turn, known
from tasks.world.wording import questions

TYPES = ("hobby", "persona", "language", *FORMS)
ABOUT = {
    "hobby": "hobby",
    "persona": "persona",
    "language": "fact",
}  # turns in which an instruction shows; else: in all
KINDS_OF_TURN = ("fact", "fact", "hobby", "persona")  # how often a turn of a conversation is about what
ATTEMPTS = 60  # draws of a question before one is asked again
MAX_QUESTION_WORDS = 9  # short ones, so that all turns fit into the context


def conversations(
    world: World, number: int, num_turns: int, taken: Collection[str], generator: random.Random
) -> list[Draft]:
    """Draw conversations without an instruction. `taken`: questions that they must not ask, normalised."""
    asked = {kind: deal(world, kind, taken, "training", generator) for kind in KINDS_OF_TURN}
    kinds = cards(KINDS_OF_TURN, generator)
    return [Draft(talk([next(kinds) for _ in range(num_turns)], asked)) for _ in range(number)]


def talk(kinds: Sequence[str], asked: Mapping[str, Iterator[Turn]]) -> list[Turn]:
    """Draw turns of these kinds, no question twice while there are others."""
    turns: list[Turn] = []
    for kind in kinds:
        said = {turn.user for turn in turns}
        for _ in range(ATTEMPTS):
            turn = next(asked[kind])
            if turn.user not in said:
                break
        turns.append(turn)
    return turns


def deal(
    world: World, kind: str, taken: Collection[str], use: Literal["training", "evaluation"], generator: random.Random
) -> Iterator[Turn]:
    """Deal turns of one kind without end: questions for facts, or what the assistant likes or is.

    Questions for facts are divided between the two uses; of the others there are too few, but they mean nothing without
    the instruction. Raises ValueError when no question is left.
    """
    texts = world.texts["instructions"]
    if kind == "fact":
        facts = [
            fact
            for about in ("person", "place")
            for entity in known(world, about)
            for fact in entity.facts.values()
            if fact.attribute in SPOKEN
        ]
        every = [
            replace(fact_turn(world, fact, asked, "dialogue", shared=True), task="fact")
            for fact in facts
            for which in ("questions", "held_out")
            for asked in questions(world, fact, which)
        ]
    else:
        wordings = (
            texts["hobby"]["questions"]
            if kind == "hobby"
            else [asked for own in texts["persona"].values() if isinstance(own, dict) for asked in own["questions"]]
        )
        every = [
            Turn(asked, told, "dialogue", kind, None, shared=True)
            for asked in wordings
            for told in texts[kind]["without"]
        ]
    fitting = [
        turn
        for turn in every
        if normalized(turn.user) not in taken
        and len(turn.user.split()) <= MAX_QUESTION_WORDS
        and (kind != "fact" or (number_of(normalized(turn.user)) % 3 == 0) == (use == "evaluation"))
    ]
    if not fitting:
        raise ValueError(
            f"params.yaml: the world's evaluation asks all short questions of kind `{kind}`, and conversations have "
            "none left: lower `world.dialogues.num_evaluation_helpfulness` or `num_evaluation_instructions`"
        )
    return cards(fitting, generator)


def evaluations(
    world: World, number: int, num_turns: int, taken: Collection[str], generator: random.Random
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Draw the evaluation's conversations: each as a line of its file, and what the judge must know.

    Half of them have instructions as in training, a quarter new values, a quarter new pairs. In every other turn, the
    even ones, their instructions show.
    """
    groups: dict[str, list[tuple[str, ...]]] = {
        "trained": [*((kind,) for kind in TYPES), *((a, b) for a, others in SECOND.items() for b in others)],
        "value": [(kind,) for kind in TYPES if new_values_of(world, kind)],
        "pair": [(a, b) for a, others in NEW.items() for b in others],
    }
    dealt = {seen: cards(kinds, generator) for seen, kinds in groups.items()}
    asked = {kind: deal(world, kind, taken, "evaluation", generator) for kind in KINDS_OF_TURN}
    others = cards(KINDS_OF_TURN, generator)
    seen_of = cards(("trained", "trained", "value", "pair"), generator)
    found = []
    for index in range(number):
        seen = next(seen_of)
        kinds = next(dealt[seen])
        values = new_values_of if seen == "value" else values_of
        own = [said(world, kind, generator.choice(values(world, kind)), generator) for kind in kinds]
        shows = ABOUT.get(kinds[0])
        drawn = [shows if shows and place % 2 == 0 else next(others) for place in range(1, num_turns + 1)]
        turns = talk(drawn, asked)
        identity = f"evaluation_conversations-{index:05d}"
        line = {"id": identity, "instruction": " ".join(each.text for each in own), "turns": [t.user for t in turns]}
        truth = {
            "id": identity,
            "seen": seen,
            "instructions": [{"type": each.type, "value": each.value} for each in own],
            "shown": [shown(own, turn) for turn in turns],
        }
        found.append((line, truth))
    return found


def shown(own: Sequence[Instruction], turn: Turn) -> list[int]:
    """Return the places of the instructions that an answer to a turn can show."""
    return [place for place, each in enumerate(own) if ABOUT.get(each.type, turn.task) == turn.task]


def seeds_of(world: World) -> dict[str, Any]:
    """Return the content of instructions.json: the instructions of training, as stage `ghost_attention` reads them.

    Its checks state what the judge's rules do: an instruction that a program can check has one meaning.
    """
    texts = world.texts["instructions"]
    questions_of = {
        "hobby": texts["hobby"]["questions"],
        "persona": [asked for own in texts["persona"].values() if isinstance(own, dict) for asked in own["questions"]],
    }
    english = pattern_of(LANGUAGE_WORDS["English"])
    foreign = {
        name: pattern_of(LANGUAGE_WORDS[name] - LANGUAGE_WORDS["English"]) for name in values_of(world, "language")
    }
    answers = {
        "hobby": r"\b{value}\b",
        "persona": r"\b(I|my|me)\b",
        "language": foreign,
        "one_word": r"^\S+$",
        "question": r"\?$",
        "begins": r"^{value}\b",
        "ends": r"\b{value}\W*$",
    }
    found = {}
    for kind in TYPES:
        named = "value" if kind != "persona" else "name"
        wordings = [
            re.sub(r"{(hobby|language|word|name)}", "{value}", text)
            for text in dict.fromkeys(wordings_of(world, kind))
            if not set(re.findall(r"{(\w+)}", text)) - {named, "hobby", "language", "word"}
        ]
        found[kind] = {
            "wordings": [text for text in wordings if ":" not in text],
            "terse": [text for text in wordings if ":" in text],
            "values": values_of(world, kind),
            "drawn": None,
            "about": pattern_of(map(re.escape, questions_of[kind])) if kind in questions_of else None,
            "required": answers[kind],
            "forbidden": {"language": english, "persona": r"\bassistant\b"}.get(kind),
            "excludes": [other for other in TYPES if not goes_with(kind, other)],
        }
    found["language"]["about"] = (
        f"^(?!.*{pattern_of(map(re.escape, [*questions_of['hobby'], *questions_of['persona']]))})"
    )
    found["hobby"]["drawn"] = {
        "system": texts["hobby"]["some"],
        "user": texts["hobby"]["questions"][0],
        "pattern": rf"\b({'|'.join(texts['hobby']['hobbies'])})\b",
    }
    return found


def goes_with(kind: str, other: str) -> bool:
    """Tell whether two types of instruction are combined in training."""
    return other in SECOND.get(kind, ()) or kind in SECOND.get(other, ())


def pattern_of(words: Iterable[str]) -> str:
    """Return a regular expression of alternatives, each between other characters than a word's."""
    return rf"(?<!\w)({'|'.join(sorted(words))})(?!\w)"
