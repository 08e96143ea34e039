"""Make dialogues that keep to an instruction given once (Llama 2, section 3.3, Ghost Attention).

Each of a round's dialogues, whose user's turns alone are kept, gets an instruction, or two that go together, drawn from
a file; values that the newest chat model itself gives come first. Where it can, half of them are worded tersely. The
newest model answers turn by turn with the instruction before every turn of the user's, reading only the last turns
before if `num_earlier_turns` says so; of the samples of a turn, the first stays that a program finds to respect it. Of
the dialogue, parts that end with such an answer become dialogues to learn: the instruction is their system message,
before the first turn alone, and fine-tuning learns the last answer only, nothing of earlier turns
(`fine_tuning.ghost_attention.loss: last`). They join those of earlier rounds.

The check is the file's expressions, which say what an instruction means; no prompt's truth decides anything. A dialogue
whose next turn has no room in the context ends there, and a part that is longer than the context is left out; both are
counted.

Run once for each entry of `ghost_attention.rounds` (`ghost_attention@v3`). Reads the newest checkpoint, the dialogues,
the instructions, the earlier round's dialogues.
Writes dialogues.jsonl, played.jsonl (what was sampled, in full), instructions.csv, plots/.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field

from model.network.checkpoint import open_checkpoint
from model.network.ranks import join_ranks
from model.sampling.sampler import Sampling, sample
from model.text.dialogue import decode_answer, encode_dialogue, encode_prompt
from tasks.conversing.playing import Drawn, Player, Script, messages_of, play
from tasks.ghost_attention.instructions import (
    Drawing,
    Kind,
    Rule,
    draw_rule,
    go_together,
    read_kinds,
    respects,
    shown_in,
    values_in,
)
from tasks.judging.intervals import wilson
from tasks.reading.dialogues import Dialogue, DialogueFiles, read_dialogues
from tasks.reading.rounds import Joining, Place, entry_at, round_of
from tasks.running.digests import number_of
from tasks.running.files import read_lines, write_lines
from tasks.running.names import metric_name
from tasks.running.params import Section
from tasks.running.places import NOTHING
from tasks.running.plots import Plot
from tasks.running.stage import Stage, start

DIALOGUES = "dialogues.jsonl"


class Params(Section):
    """Which dialogues get which instructions, and how they are answered."""

    rounds: dict[str, Joining] = Field(description="rounds that have Ghost Attention")
    root: str = Field(min_length=1, description="directory of the dialogues; DVC watches it")
    sources: dict[str, DialogueFiles] = Field(min_length=1, description="what is read below the root")
    max_malformed_share: float = Field(ge=0, lt=1, description="maximum share of malformed dialogues in a source")
    instructions: str = Field(min_length=1, description="file of the kinds of instruction")
    num_dialogues: int = Field(gt=0, description="dialogues of one round that get an instruction")
    combined_share: float = Field(
        ge=0, le=1, description="share of them with two kinds of instruction, where it can be"
    )
    terse_share: float = Field(ge=0, le=1, description="share of the instructions that are worded tersely")
    num_drawn: int = Field(ge=0, description="answers in which the chat model gives values; 0: it is not asked")
    min_draws: int = Field(gt=0, description="answers in which a value must come to be used")
    min_values: int = Field(gt=0, description="values that a chat model must give; else the file's are used")
    num_earlier_turns: int | None = Field(
        ge=0, description="turns that the model reads before one it answers; null: all"
    )
    num_samples: int = Field(gt=0, description="answers drawn to each turn")
    temperature: float = Field(gt=0, description="at which they are drawn")
    top_p: float = Field(gt=0, le=1, description="draw among the likeliest tokens with this total probability; 1: all")
    top_k: int = Field(ge=0, description="draw among this many of the likeliest tokens; 0: all")
    max_new_tokens: int = Field(gt=0, description="maximum tokens of an answer, EOS included")
    max_parts: int = Field(gt=0, description="parts of one dialogue that are learnt, each to another answer")
    precision: Literal["fp32", "bf16"] = Field(description="weights and products")
    max_rows: int = Field(gt=0, description="answers drawn at once; more need more memory")


class Told(NamedTuple):
    """A dialogue with its instructions."""

    id: str
    rule: Rule
    turns: Sequence[str]  # the user's


class Turn(NamedTuple):
    """What was answered in one turn; `held`: whether each instruction that shows in it was respected."""

    number: int  # from 1
    answer: Drawn
    held: Mapping[str, bool]  # by kind

    @property
    def shows(self) -> bool:
        """Whether there was anything to respect."""
        return bool(self.held)

    @property
    def is_held(self) -> bool:
        """Whether all of it was respected by an answer that the model ended."""
        return self.shows and self.answer.finished and all(self.held.values())


def run(stage: Stage[Params]) -> dict[str, float]:
    """Draw the instructions, play the dialogues, choose what is learnt."""
    params, place = stage.params, round_of(stage.name)
    own = entry_at(place, params.rounds, stage.section)
    earlier = earlier_dialogues(own, place)
    kinds = read_kinds(Path(params.instructions), "ghost_attention.instructions")
    check_combined(params, kinds)
    dialogues, num_short = dialogues_of(params, stage.section, place, stage.seed)
    device = join_ranks()
    model, tokenizer = open_checkpoint(Path(own.newest), params.precision, device)
    sampling = Sampling(
        temperature=params.temperature, top_p=params.top_p, top_k=params.top_k, max_new_tokens=params.max_new_tokens
    )

    def answers_to(drawn: Drawing, number: int) -> list[str]:
        ids = encode_prompt(messages_of(Script("", drawn.system, [drawn.user]), [], 0), tokenizer)
        seed = number_of(f"{stage.seed} {place.name} values {drawn.user}")
        (found,) = sample(
            model,
            [ids],
            sampling,
            num_samples=number,
            eos_id=tokenizer.eos_id,
            seeds=[seed],
            max_rows=params.max_rows,
            description=None,
        )
        return [decode_answer(response.ids, tokenizer) for response in found if response.finished]

    # asked on one rank: a last digit that differs on another machine must not give ranks different instructions
    given: dict[str, list[str]] = {}
    for name, kind in kinds.items() if stage.rank == 0 else []:
        asked = answers_to(kind.drawn, params.num_drawn) if kind.drawn and params.num_drawn else []
        given[name] = values_in(kind, asked, params.min_draws) if asked else []
    shared = [given]
    torch.distributed.broadcast_object_list(shared, src=0)
    given = shared[0]
    values = {
        name: given[name] if len(given[name]) >= params.min_values else kind.values for name, kind in kinds.items()
    }
    told = told_of(params, kinds, values, dialogues, random.Random(f"{stage.seed} {place.name} instructions"))

    def pick(number: int, turn: int, drawn: Sequence[Drawn]) -> int:
        """Return the first answer that the model ended and that respects what it can; else the first that it ended."""
        held = [turn_of(kinds, told[number], turn, each) for each in drawn]
        wanted = [at for at, each in enumerate(held) if each.is_held or (not each.shows and each.answer.finished)]
        ended = [at for at, each in enumerate(drawn) if each.finished]
        return (wanted or ended or [0])[0]

    scripts = [Script(each.id, "", [f"{each.rule.text} {turn}" for turn in each.turns]) for each in told]
    player = Player(
        model, tokenizer, sampling, params.num_samples, params.max_rows, stage.seed, params.num_earlier_turns, pick
    )
    played = play(player, scripts, stage.scratch / "turns", stage.name if stage.rank == 0 else None)
    turns = [
        [turn_of(kinds, each, number, answer) for number, answer in enumerate(answers)]
        for each, answers in zip(told, played, strict=True)
    ]
    parts = [
        line
        for each, own_turns in zip(told, turns, strict=True)
        for line in parts_of(params, place, each, own_turns, stage.seed)
    ]
    context = model.config.max_position_embeddings
    lines = [line for line in parts if len(encode_dialogue(line["messages"], tokenizer).ids) <= context]
    if parts and not lines:
        raise ValueError(
            f"all {len(parts)} parts of dialogues that respect their instruction are longer than the context of "
            f"{context} tokens: bring shorter dialogues, or lower `ghost_attention.max_new_tokens`"
        )
    if not lines:
        raise ValueError(
            f"no answer of {own.newest} respects its instruction, in {len(told)} dialogues with {params.num_samples} "
            "samples a turn: there is nothing to learn from; raise `ghost_attention.num_samples`, or teach the model "
            "to follow instructions by demonstrations first"
        )
    if stage.rank == 0:
        write_lines(stage.output / DIALOGUES, [*earlier, *lines])
        write_lines(stage.output / "played.jsonl", (played_line(*each) for each in zip(told, turns, strict=True)))
        report(stage, kinds, given, turns)
    shown = [turn for own_turns in turns for turn in own_turns if turn.shows]
    return {
        "dialogues": len(earlier) + len(lines),
        "dialogues_earlier": len(earlier),
        "played": len(told),
        "too_short": num_short,
        "too_long": len(parts) - len(lines),
        "cut_short": sum(len(own_turns) < len(each.turns) for each, own_turns in zip(told, turns, strict=True)),
        "values_drawn": sum(len(own) for own in given.values()),
        "held": sum(turn.is_held for turn in shown) / max(1, len(shown)),
        **{
            metric_name("kind", name, "held"): share
            for name in kinds
            for share in [share_held(shown, name)]
            if share is not None
        },
    }


def check_combined(params: Params, kinds: Mapping[str, Kind]) -> None:
    """Raise ValueError when instructions are to be combined and all of them contradict each other."""
    if params.combined_share and not any(go_together(kinds, *pair) for pair in itertools.combinations(kinds, 2)):
        raise ValueError(
            f"`ghost_attention.combined_share` is {params.combined_share}, but all kinds of instruction in "
            f"{params.instructions} exclude each other ({', '.join(kinds)}): set it to 0, or add one that goes with "
            "others"
        )


# --- what is told ---


def earlier_dialogues(own: Joining, place: Place) -> list[dict[str, Any]]:
    """Return the dialogues of the earlier rounds. Raises ValueError when they are missing."""
    path = Path(own.earlier) / DIALOGUES
    if path.parent == NOTHING:
        return []
    if not path.is_file():
        raise ValueError(
            f"{path} is missing, though `ghost_attention.rounds.{place.name}.earlier` names its directory: run that "
            f"round's stage first, or write {NOTHING} if there is none"
        )
    return read_lines(path)


def dialogues_of(params: Params, section: str, place: Place, seed: int) -> tuple[list[Dialogue], int]:
    """Return the dialogues of the round, and how many were left out as they have no second turn.

    Raises ValueError when none is left.
    """
    found, _ = read_dialogues(Path(params.root), params.sources, section, params.max_malformed_share)
    long = [each for each in found if sum(message["role"] == "user" for message in each["messages"]) > 1]
    if not long:
        raise ValueError(
            f"none of the {len(found)} dialogues in `{section}.sources` has two turns of the user's: an instruction "
            "can't hold from one to the next; bring longer ones"
        )
    long.sort(key=lambda each: number_of(f"{seed} {place.name} {each['source']} {each['id']}"))
    return long[: params.num_dialogues], len(found) - len(long)


def told_of(
    params: Params,
    kinds: Mapping[str, Kind],
    values: Mapping[str, Sequence[str]],
    dialogues: Sequence[Dialogue],
    generator: random.Random,
) -> list[Told]:
    """Give each dialogue its instructions, each kind equally often as the first."""
    found = []
    firsts: list[str] = []
    for dialogue in dialogues:
        firsts = firsts or generator.sample(list(kinds), len(kinds))
        rule = draw_rule(kinds, values, firsts.pop(), params.combined_share, params.terse_share, generator)
        turns = [message["content"] for message in dialogue["messages"] if message["role"] == "user"]
        found.append(Told(f"{dialogue['source']} {dialogue['id']}", rule, turns))
    return found


# --- what is learnt ---


def turn_of(kinds: Mapping[str, Kind], told: Told, place: int, answer: Drawn) -> Turn:
    """Return an answer with what it respects."""
    shown = shown_in(kinds, told.rule, told.turns[place])
    return Turn(place + 1, answer, {each.kind: respects(kinds, each, answer.text) for each in shown})


def parts_of(params: Params, place: Place, told: Told, turns: Sequence[Turn], seed: int) -> list[dict[str, Any]]:
    """Return the parts of a dialogue that end with an answer that holds, after the first turn, as they are learnt.

    Of more than `max_parts`, a hash draws some: all distances from the instruction are learnt.
    """
    ends = [turn.number for turn in turns if turn.is_held and turn.number > 1]
    ends.sort(key=lambda number: number_of(f"{seed} {place.name} {told.id} part {number}"))
    script = Script(told.id, told.rule.text, told.turns)
    answers = [turn.answer for turn in turns]
    return [
        {
            "id": f"{told.id} {place.name} turn {number}",
            "messages": [
                *messages_of(script, answers, number - 1),
                {"role": "assistant", "content": answers[number - 1].text},
            ],
            "category": "instruction",
            "safety": False,
            "source": place.name,
        }
        for number in sorted(ends[: params.max_parts])
    ]


# --- the report ---


def share_held(turns: Sequence[Turn], kind: str) -> float | None:
    """Return the share of answers that respect a kind of instruction, of those that show it; None if none does."""
    own = [turn.held[kind] and turn.answer.finished for turn in turns if kind in turn.held]
    return sum(own) / len(own) if own else None


def played_line(told: Told, turns: Sequence[Turn]) -> dict[str, Any]:
    """Return a line of played.jsonl."""
    return {
        "id": told.id,
        "instruction": told.rule.text,
        "kinds": [each.kind for each in told.rule.instructions],
        "turns": [
            {
                "user": told.turns[turn.number - 1],
                "answer": turn.answer.text,
                "finished": turn.answer.finished,
                "held": dict(turn.held),
            }
            for turn in turns
        ],
    }


def report(
    stage: Stage[Params], kinds: Mapping[str, Kind], given: Mapping[str, Sequence[str]], turns: Sequence[Sequence[Turn]]
) -> None:
    """Plot how often the samples respect their instructions by turn; write the kinds and the values drawn."""
    import pandas

    by_turn: dict[int, list[bool]] = defaultdict(list)
    for own in turns:
        for turn in own:
            if turn.shows:
                by_turn[turn.number].append(turn.is_held)
    rows = [
        {
            "turn": number,
            "share": sum(held) / len(held),
            **dict(zip(("low", "high"), wilson(sum(held), len(held)), strict=True)),
        }
        for number, held in sorted(by_turn.items())
    ]
    title = "Ghost Attention, samples that respect their instruction"
    stage.plot("held", pandas.DataFrame(rows), Plot("curves", title, "turn", "share", "turn", "share of answers"))
    table = pandas.DataFrame(
        {"kind": name, "values": len(kind.values), "given by the model": ", ".join(given[name])}
        for name, kind in kinds.items()
    )
    table.to_csv(stage.output / "instructions.csv", index=False)


if __name__ == "__main__":
    start(Params, run)
