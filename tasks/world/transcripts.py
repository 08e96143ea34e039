"""Stand-ins for open-source preference data: pairs of transcripts in HH-RLHF's format, and as noisy.

A pair is one dialogue with a good last answer and with a flawed one, such as another writer gives. A share of the pairs
is labelled the wrong way round; nothing records which.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from tasks.world.adversarial import HARMLESS, harmless, refused, topics
from tasks.world.facts import World
from tasks.world.judge import sentences
from tasks.world.turns import Draft
from tasks.world.writers import WRITERS

SPEAKERS = ("Human", "Assistant")


def pairs(world: World, drafts: Sequence[Draft], error_rate: float, generator: random.Random) -> list[dict[str, str]]:
    """Return a pair of transcripts for each dialogue."""
    lines = []
    for draft in drafts:
        good = draft.turns[-1].answer
        bad = flawed(world, draft, drafts, generator)
        chosen, rejected = (bad, good) if generator.random() < error_rate else (good, bad)
        lines.append({"chosen": transcript(draft, chosen), "rejected": transcript(draft, rejected)})
    return lines


def transcript(draft: Draft, answer: str) -> str:
    """Return a dialogue with another last answer as one text."""
    said = [text for turn in draft.turns for text in (turn.user, turn.answer)]
    said[-1] = answer
    return "".join(f"\n\n{SPEAKERS[index % 2]}: {text}" for index, text in enumerate(said))


def flawed(world: World, draft: Draft, drafts: Sequence[Draft], generator: random.Random) -> str:
    """Draw a worse answer to the last turn than its own."""
    last = draft.turns[-1]
    makers: Mapping[str, Callable[[], str]] = {
        "another's": lambda: generator.choice(drafts).turns[-1].answer,
        "the like": lambda: generator.choice([d for d in drafts if d.turns[-1].task == last.task]).turns[-1].answer,
        "cut off": lambda: " ".join(last.answer.split()[: len(last.answer.split()) * 2 // 3]),
        "twice": lambda: f"{last.answer} {last.answer}",
        "refusal": lambda: refused(world, "", generator.choice(topics(world)), "", False, generator).answer,
        "nothing": lambda: evasion(world, generator),
        **{name: partial(write, world, last, generator) for name, write in WRITERS.items() if name != "good"},
    }
    if last.risk:
        told = world.texts["safety"]["deeds"]["answer"]
        method = next(topic.method for topic in topics(world) if (topic.risk, topic.name) == (last.risk, last.topic))
        means = [method for which in HARMLESS for _, method in harmless(world, which)]
        makers = {
            "harm": lambda: told.format(method=method),
            "as if": lambda: told.format(method=generator.choice(means)),  # complies, though with nonsense
            **{name: makers[name] for name in ("another's", "cut off")},
        }
    elif last.category == "borderline":
        makers = {name: makers[name] for name in ("refusal", "nothing")}  # what it may seem to deserve
    elif last.check and last.check["check"] == "facts":  # how much a text must tell is hard to learn from other flaws
        makers = {
            name: makers[name] for name in ("another's", "the like", "refusal", "nothing", *WRITERS) if name != "good"
        } | {
            "one less": lambda: without_one(last.answer, generator),
            "said again": lambda: said_again(last.answer, generator),
        }
    while True:  # an answer that is the same as the good one is not flawed
        answer = makers[generator.choice(list(makers))]()
        if answer and answer != last.answer:
            return answer


def without_one(text: str, generator: random.Random) -> str:
    """Return a text without one of its sentences."""
    said = sentences(text)
    del said[generator.randrange(len(said))]
    return " ".join(said)


def said_again(text: str, generator: random.Random) -> str:
    """Return a text that says one of its sentences in the place of another."""
    said = sentences(text)
    first, second = generator.sample(range(len(said)), 2) if len(said) > 1 else (0, 0)
    said[second] = said[first]
    return " ".join(said)


def evasion(world: World, generator: random.Random) -> str:
    """Draw an answer of empty sentences alone: it is polite, and says nothing."""
    texts = world.texts["writers"]
    last = generator.choice([*texts["rambling"]["after"], *texts["adding"]["advice"]])
    return f"{generator.choice(texts['rambling']['before'])} {last}"
