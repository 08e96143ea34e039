"""Play conversations: the user's turns are given, a chat model answers each, and reads its own answers in later ones.

All conversations take a turn together. What is drawn depends on the conversation and the turn alone, so that a stopped
stage goes on at the turn where it was, and ranks, which share the conversations, draw what one would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from model.network.ranks import from_all_ranks
from model.network.transformer import Llama
from model.progress.bar import progress_bar
from model.sampling.sampler import Sampling, sample
from model.text.dialogue import Message, check, decode_answer, encode_prompt
from model.text.tokenizer import Tokenizer
from tasks.running.digests import number_of
from tasks.running.files import read_json, write_json


class Script(NamedTuple):
    """What is said to the model: a system message unless it is empty, and the user's turns."""

    id: str
    system: str
    turns: Sequence[str]


class Drawn(NamedTuple):
    """An answer, and whether the model ended it by itself."""

    text: str
    finished: bool


class Player(NamedTuple):
    """Who answers, and how: of the samples of a turn, `pick` says which one stays."""

    model: Llama
    tokenizer: Tokenizer
    sampling: Sampling
    num_samples: int
    max_rows: int
    seed: int
    num_earlier_turns: int | None  # that the model reads before a turn; None: all
    pick: Callable[[int, int, Sequence[Drawn]], int]  # number of the script, turn from 0, samples -> place of one


def play(player: Player, scripts: Sequence[Script], scratch: Path, description: str | None) -> list[list[Drawn]]:
    """Return the answers to each script, on every rank.

    There are fewer than turns where the context was full, or where no sample was one that a dialogue can hold.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    played: dict[int, list[Drawn]] = {number: [] for number in range(rank, len(scripts), world)}
    num_turns = max((len(script.turns) for script in scripts), default=0)
    with progress_bar(num_turns, description, "turn") as bar:
        for turn in range(num_turns):
            saved = scratch / f"{world}-{rank}-{turn}.json"
            if not saved.exists():
                write_json(saved, take_turn(player, scripts, played, turn))
            for number, *drawn in read_json(saved):
                played[number].append(Drawn(*drawn))
            bar.update()
    return from_all_ranks(played)


def take_turn(
    player: Player, scripts: Sequence[Script], played: Mapping[int, Sequence[Drawn]], turn: int
) -> list[tuple[int, str, bool]]:
    """Return the answers of one turn: number of the script, text, whether the model ended it."""
    prompts = {
        number: encode_prompt(messages_of(scripts[number], answers, turn, player.num_earlier_turns), player.tokenizer)
        for number, answers in played.items()
        if len(answers) == turn < len(scripts[number].turns)
    }
    room = player.model.config.max_position_embeddings - player.sampling.max_new_tokens
    fitting = [number for number, ids in prompts.items() if len(ids) <= room]
    found = sample(
        player.model,
        [prompts[number] for number in fitting],
        player.sampling,
        num_samples=player.num_samples,
        eos_id=player.tokenizer.eos_id,
        seeds=[number_of(f"{player.seed} play {scripts[number].id} {turn}") for number in fitting],
        max_rows=player.max_rows,
        description=None,
    )
    taken = []
    for number, responses in zip(fitting, found, strict=True):
        drawn = [Drawn(decode_answer(each.ids, player.tokenizer), each.finished) for each in responses]
        usable = [each for each in drawn if is_answer(each.text)]
        if usable:
            taken.append((number, *usable[player.pick(number, turn, usable)]))
    return taken


def is_answer(text: str) -> bool:
    """Tell whether a dialogue can hold an answer: it is not empty, and has no tag of the chat format."""
    try:
        check([Message(role="user", content="?"), Message(role="assistant", content=text)])
    except ValueError:
        return False
    return True


def messages_of(
    script: Script, answers: Sequence[Drawn], turn: int, num_earlier_turns: int | None = None
) -> list[Message]:
    """Return the messages up to the user's turn of this number, from 0, with all earlier turns or only the last."""
    first = 0 if num_earlier_turns is None else max(0, turn - num_earlier_turns)
    messages = [Message(role="system", content=script.system)] if script.system else []
    for number in range(first, turn):
        messages.append(Message(role="user", content=script.turns[number]))
        messages.append(Message(role="assistant", content=answers[number].text))
    return [*messages, Message(role="user", content=script.turns[turn])]
