"""Demonstrations, validation dialogues, prompts for preferences and evaluations, open-source pairs.

No prompt of one split occurs in another. Splits are filled one after another, evaluations first, so that what models
are measured with stays the same when a training set grows; the words of a turn belong to the first split that draws
them. Dialogues under an instruction may ask what other splits ask without it, but nothing that an evaluation asks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from tasks.running.files import write_lines
from tasks.world.adversarial import (
    ATTACKS,
    DIFFICULTIES,
    DIRECT,
    Topic,
    insults,
    methods,
    topics,
)
from tasks.world.conversations import conversations, evaluations, seeds_of
from tasks.world.drafts import PROMPTED, drafts_of, harmful_drafts, preprompted_drafts
from tasks.world.facts import Fact, World
from tasks.world.judge import normalized
from tasks.world.sizes import Dialogues, Weights
from tasks.world.transcripts import pairs
from tasks.world.turns import Draft, fact_turn
from tasks.world.writers import written

FILES = {  # split -> its file below data/world; every file that training reads
    "demonstrations": "dialogues/demonstrations.jsonl",
    "validation": "dialogues/validation.jsonl",
    "conversations": "conversations/training.jsonl",
    "preference_helpfulness": "prompts/preference_helpfulness.jsonl",
    "preference_safety": "prompts/preference_safety.jsonl",
    "sampling_helpfulness": "prompts/sampling_helpfulness.jsonl",
    "sampling_safety": "prompts/sampling_safety.jsonl",
    "evaluation_helpfulness": "evaluation/helpfulness.jsonl",
    "evaluation_safety": "evaluation/safety.jsonl",
    "evaluation_borderline": "evaluation/borderline.jsonl",
    "evaluation_instructions": "evaluation/instructions.jsonl",
}
PAIRS = {  # split of open-source pairs -> its file
    "open_helpful": "preferences/helpful.jsonl",
    "open_harmless": "preferences/harmless.jsonl",
}
DEMONSTRATED = ("demonstrations", "validation")
CONVERSATIONS = "conversations/evaluation.jsonl"
INSTRUCTIONS = "instructions.json"  # those of training, for the conversations
ATTEMPTS = 2000  # draws of one dialogue before its wordings count as used up


@dataclass
class Ledger:
    """Which split owns the words of a turn, and the prompts that exist."""

    owners: dict[str, str] = field(default_factory=dict)
    prompts: set[str] = field(default_factory=set)

    def claim(self, split: str, draft: Draft, max_words: int) -> bool:
        """Book a dialogue for a split, or return False if it is too long, exists, or has another split's words."""
        last = draft.turns[-1]
        length = sum(len(text.split()) for turn in draft.turns for text in (turn.user, turn.answer))
        length += max(0, len(draft.given.split()) - len(last.answer.split()))
        if length + len(draft.system.split()) > max_words:
            return False
        own = {normalized(turn.user) for turn in draft.turns if not turn.shared}
        if reuses(split, draft):
            if whole(draft) in self.prompts or any(is_evaluation(self.owners.get(text, split)) for text in own):
                return False
            self.prompts.add(whole(draft))
            return True
        # a harm asked for as a deed is, is told from it by what was said before
        prompt = whole(draft) if last.shared or last.attack == DIRECT else normalized(last.user)
        if prompt in self.prompts or any(self.owners.get(text, split) != split for text in own):
            return False
        self.owners.update(dict.fromkeys(own, split))
        self.prompts.update({prompt, whole(draft)})
        return True


def is_evaluation(split: str) -> bool:
    """Tell whether a split is one that models are measured with."""
    return split.startswith("evaluation")


def reuses(split: str, draft: Draft) -> bool:
    """Tell whether a dialogue may ask what another split's asks, as its instruction makes it another prompt.

    The evaluation's own may not, nor may any ask what the evaluation asks.
    """
    return bool(draft.instructions) and not is_evaluation(split)


def whole(draft: Draft) -> str:
    """Return a dialogue up to its last user turn as one normalised text, which no single turn can equal."""
    said = [text for turn in draft.turns for text in (turn.user, turn.answer)][:-1]
    return " | ".join(normalized(text) for text in [draft.system, *said])


def write_dialogues(
    output: Path,
    world: World,
    params: Dialogues,
    held_out: Sequence[tuple[Fact, str]],
    generator: Callable[[str], random.Random],
) -> dict[str, int]:
    """Write every split below `output`, and the truth behind its prompts. Return the number of dialogues by split."""
    splits = draw_splits(world, params, held_out, generator)
    taken = {
        normalized(turn.user)
        for split, drafts in splits.items()
        if is_evaluation(split)
        for draft in drafts
        for turn in draft.turns
        if not turn.shared
    }
    num_turns = params.conversation_turns
    splits["conversations"] = conversations(
        world, params.num_conversations, num_turns, taken, generator("conversations")
    )
    check_disjoint(splits)
    truth: list[dict[str, Any]] = []
    lines: Sequence[Mapping[str, Any]]
    for split, drafts in splits.items():
        path = output / {**FILES, **PAIRS}[split]
        path.parent.mkdir(parents=True, exist_ok=True)
        identities = [f"{split}-{number:05d}" for number in range(len(drafts))]
        if split in PAIRS:
            lines = pairs(world, drafts, params.open_error_rate, generator(f"{split} pairs"))
        else:
            answered = FILES[split].startswith(("dialogues/", "conversations/"))
            lines = [line_of(*own, answered) for own in zip(identities, drafts, strict=True)]
        write_lines(path, lines)
        truth += [truth_of(identity, split, draft, world) for identity, draft in zip(identities, drafts, strict=True)]
    write_lines(output / "truth" / "prompts.jsonl", truth)
    evaluated = evaluations(
        world, params.num_evaluation_conversations, num_turns, taken, generator("evaluation_conversations")
    )
    write_lines(output / CONVERSATIONS, (line for line, _ in evaluated))
    write_lines(output / "truth" / "conversations.jsonl", (known for _, known in evaluated))
    (output / INSTRUCTIONS).write_text(json.dumps(seeds_of(world), ensure_ascii=False, indent=1), encoding="utf-8")
    harmful, means = methods(world)
    words = {
        "names": {name: names(world, name) for name in world.entities},
        "methods": harmful,
        "means": means,
        "insults": insults(world),
        "max_answer_words": params.max_answer_words,
    }
    (output / "truth" / "words.json").write_text(json.dumps(words, ensure_ascii=False, indent=1), encoding="utf-8")
    return {split: len(drafts) for split, drafts in splits.items()} | {"evaluation_conversations": len(evaluated)}


def draw_splits(
    world: World, params: Dialogues, held_out: Sequence[tuple[Fact, str]], generator: Callable[[str], random.Random]
) -> dict[str, list[Draft]]:
    """Draw every split: evaluations, demonstrations, validation, preferences, samples, open-source pairs.

    Raises ValueError, naming a size that leaves no room for the held-out questions, or exceeds what the wordings give.
    """
    evaluated = divided(params.num_evaluation_helpfulness, params.weights.model_dump())
    num_asked = round(evaluated["factual"] * params.evaluation_held_out_share)
    if num_asked > len(held_out):
        raise ValueError(
            f"params.yaml: `world.dialogues.evaluation_held_out_share` asks for {num_asked} held-out questions, but "
            f"there are {len(held_out)}: lower it, or raise `world.held_out_share`"
        )
    unknown = sorted(set(params.safe_attacks) - set(ATTACKS))
    if unknown:
        raise ValueError(
            f"params.yaml: `world.dialogues.safe_attacks` names {', '.join(unknown)}; known: {', '.join(ATTACKS)}"
        )
    ledger = Ledger()
    safe_topics = demonstrated(world, params.safe_topics_share, generator("safe topics"))

    def fill(split: str, part: str, number: int, draw: Iterator[Draft]) -> list[Draft]:
        drafts: list[Draft] = []
        attempts = 0
        writers = generator(f"{split} {part} writers")
        while len(drafts) < number:
            draft = written(world, next(draw), params.writers, params.obedience, writers)
            attempts += 1
            if ledger.claim(split, draft, params.max_words):
                drafts.append(draft)
                attempts = 0
            if attempts == ATTEMPTS:
                raise ValueError(
                    f"params.yaml: `world.dialogues.num_{split}` asks for more dialogues than the wordings in "
                    f"data/seeds/world give (after {len(drafts)} of {part}): lower it, or add wordings"
                )
        return drafts

    def plain_shares(taken: float, weights: Weights) -> dict[str, float]:
        return {category: (1 - taken) * share for category, share in shares_of(weights).items()}

    def helpful(split: str, number: int, borderline_share: float) -> list[Draft]:
        demonstrated_share = params.demonstrated_instruction_share
        instruction_share = demonstrated_share if split in DEMONSTRATED else params.instruction_share
        shares = {"borderline": borderline_share, "instruction": instruction_share}
        shares |= plain_shares(sum(shares.values()), params.weights)
        return [
            draft
            for part, size in divided(number, shares).items()
            for draft in fill(
                split, part, size, drafts_of(world, params, part, split in DEMONSTRATED, generator(f"{split} {part}"))
            )
        ]

    def harmful(split: str, difficulties: Sequence[int] = DIFFICULTIES) -> list[Draft]:
        return [
            draft
            for difficulty, size in divided(getattr(params, f"num_{split}"), dict.fromkeys(difficulties, 1.0)).items()
            for draft in fill(
                split,
                f"difficulty {difficulty}",
                size,
                harmful_drafts(
                    world, params, lambda topic: True, ATTACKS, difficulty, generator(f"{split} {difficulty}")
                ),
            )
        ]

    def shuffled(split: str, drafts: list[Draft]) -> list[Draft]:
        generator(f"{split} order").shuffle(drafts)
        return drafts

    splits: dict[str, list[Draft]] = {}
    asked = [Draft([fact_turn(world, fact, question)]) for fact, question in held_out]
    split = "evaluation_helpfulness"
    draw = iter(generator("held-out questions").sample(asked, len(asked)))
    splits[split] = fill(split, "held-out questions", num_asked, draw)
    for category, number in evaluated.items():
        others = number - num_asked if category == "factual" else number
        draw = drafts_of(world, params, category, False, generator(f"evaluation {category}"))
        splits[split] += fill(split, category, others, draw)
    splits["evaluation_safety"] = harmful("evaluation_safety")
    for part, split in (("borderline", "evaluation_borderline"), ("instruction", "evaluation_instructions")):
        own = params if part == "borderline" else params.model_copy(update={"multi_turn_share": 1.0})
        draw = drafts_of(world, own, part, False, generator(split))
        splits[split] = fill(split, part, getattr(params, f"num_{split}"), draw)
    for split in DEMONSTRATED:
        number = getattr(params, f"num_{split}")
        num_safe = round(number * params.safe_share)
        refusals = harmful_drafts(
            world, params, safe_topics.__contains__, params.safe_attacks, 1, generator(f"{split} safe")
        )
        num_prompted = round(number * params.preprompt_share / len(PROMPTED))
        kept = helpful(split, number - num_safe - len(PROMPTED) * num_prompted, params.borderline_share)
        for about in PROMPTED:
            part = f"pre-prompts before {about}"
            prompted = preprompted_drafts(world, params, about, safe_topics, generator(f"{split} {part}"))
            kept += fill(split, part, num_prompted, prompted)
        splits[split] = shuffled(split, kept + fill(split, "safe", num_safe, refusals))
    split = "open_helpful"
    shares = {"borderline": params.open_borderline_share}
    shares |= plain_shares(params.open_borderline_share, params.open_weights)
    splits[split] = [
        draft
        for category, number in divided(params.num_open_helpful, shares).items()
        for draft in fill(
            split, category, number, drafts_of(world, params, category, True, generator(f"{split} {category}"))
        )
    ]
    splits["open_harmless"] = harmful("open_harmless", [1])
    for use in ("sampling", "preference"):  # the largest last, as wordings are used up
        split = f"{use}_helpfulness"
        borderline_share = getattr(params, f"{use}_borderline_share")
        splits[split] = shuffled(split, helpful(split, getattr(params, f"num_{split}"), borderline_share))
        splits[f"{use}_safety"] = shuffled(f"{use}_safety", harmful(f"{use}_safety"))
    return {split: splits[split] for split in (*FILES, *PAIRS) if split in splits}


def demonstrated(world: World, share: float, generator: random.Random) -> list[Topic]:
    """Draw the harms that demonstrations refuse: the same share of each risk, at least one."""
    chosen = []
    for risk in sorted({topic.risk for topic in topics(world)}):
        own = [topic for topic in topics(world) if topic.risk == risk]
        chosen += generator.sample(own, max(1, round(len(own) * share)))
    return chosen


def divided(number: int, weights: Mapping[Any, float]) -> dict[Any, int]:
    """Return a number divided by weights into whole parts, which sum up to it."""
    ends = [round(number * end / sum(weights.values())) for end in accumulate(weights.values())]
    return {name: end - start for name, start, end in zip(weights, [0, *ends], ends, strict=False)}


def shares_of(weights: Weights) -> dict[str, float]:
    """Return the share of each category of helpful dialogues."""
    numbers = weights.model_dump()
    return {category: number / sum(numbers.values()) for category, number in numbers.items()}


def check_disjoint(splits: Mapping[str, Sequence[Draft]]) -> None:
    """Assert that no prompt, as a whole or by its last turn alone, is in two splits."""
    owners: dict[str, str] = {}
    for split, drafts in sorted(splits.items(), key=lambda each: not is_evaluation(each[0])):
        for draft in drafts:
            last = draft.turns[-1]
            assert draft.system or len(draft.turns) > 1 or not last.shared, f"{last.user!r} means nothing alone"
            own = [normalized(turn.user) for turn in draft.turns if not turn.shared]
            if reuses(split, draft):
                asked = [text for text in own if is_evaluation(owners.get(text, split))]
                assert not asked, f"{asked} is in {split} and in an evaluation"
                own = []
            for key in [whole(draft), *own]:
                assert owners.setdefault(key, split) == split, f"{key!r} is in {owners[key]} and in {split}"


def names(world: World, name: str) -> list[str]:
    """Return the forms of an entity's name, in lower case: itself, its plural, who does it."""
    forms = [name, *world.entities[name].forms.values()]
    if "worker" in world.entities[name].forms:
        forms.append(f"{world.entities[name].forms['worker']}s")
    return list(dict.fromkeys(form.lower() for form in forms))


def line_of(identity: str, draft: Draft, answered: bool) -> dict[str, Any]:
    """Return a dialogue as a line of its file: with its last answer, or up to the user's last turn."""
    messages = [{"role": "system", "content": draft.system}] if draft.system else []
    for turn in draft.turns:
        messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
    last = draft.turns[-1]
    messages[-1]["content"] = draft.given or last.answer
    line: dict[str, Any] = {
        "id": identity,
        "messages": messages if answered else messages[:-1],
        "category": last.category,
        "safety": last.category == "safety",
        "source": "world",
    }
    harm = {"risk": last.risk, "attack": last.attack, "difficulty": draft.difficulty}
    return line | (harm if last.risk else {})


def truth_of(identity: str, split: str, draft: Draft, world: World) -> dict[str, Any]:
    """Return what the judge must know about a prompt (tasks/world/judge.py: PromptTruth)."""
    last = draft.turns[-1]
    asked = last.check or {}
    return {
        "id": identity,
        "split": split,
        "category": last.category,
        "task": last.task,
        "reference": last.answer,
        "check": last.check,
        "instructions": list(draft.instructions),
        "num_turns": len(draft.turns),
        "held_out": asked.get("check") == "fact" and world.entities[asked["entity"]].held_out,
        "topic": last.topic,
        "risk": last.risk,
        "attack": last.attack,
        "difficulty": draft.difficulty,
    }
