"""Gather multi-turn prompts for the evaluation: two models give a dialogue's earlier answers (Llama 2, section 3.4.2).

The user's turns are those of the evaluation's own dialogues of several turns, which no training has seen. The last one
is what every version is asked; those before it are answered in the paper's four ways, which gives four prompts:

- first, second: one model gives all answers.
- better: both answer each turn, and the reward model of the dialogue's kind says whose answer stays.
- alternating: they take turns, and every other dialogue begins with the second model.

A dialogue ends early where an answer is empty, has a tag, or finds no room; it then gives no prompt in that way.

Reads the evaluation's prompts, two chat models and two reward models.
Writes prompts.jsonl: prompts with `asks`, the id of the dialogue, and `gathered`, the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field

from model.network.checkpoint import open_checkpoint
from model.network.ranks import from_all_ranks, join_ranks
from model.sampling.sampler import Sampling
from model.scoring.answers import check_same_tokenizer
from model.scoring.reward import RewardModel, open_reward, score
from model.text.dialogue import Message, encode_dialogue
from model.text.tokenizer import Tokenizer
from tasks.conversing.playing import Drawn, Player, Script, messages_of, take_turn
from tasks.reading.prompts import KINDS, Kind, Prompt, kind_of, read_prompts
from tasks.running.digests import number_of
from tasks.running.files import read_json, write_json, write_lines
from tasks.running.params import Section
from tasks.running.places import DATA, NOTHING
from tasks.running.stage import Stage, start

Way = Literal["first", "second", "better", "alternating"]
WAYS: tuple[Way, ...] = ("first", "second", "better", "alternating")
Played = dict[Way, dict[int, list[Drawn]]]  # answers so far, by way and number of the dialogue


class Numbers(Section):
    """A number for each kind of prompts."""

    helpfulness: int = Field(ge=0, description="dialogues that end with a helpful or borderline prompt")
    safety: int = Field(ge=0, description="dialogues that end with an adversarial prompt")


class Params(Section):
    """Which dialogues two models play, and how."""

    root: str = Field(min_length=1, description="directory of the prompt files, which DVC watches")
    prompts: list[str] = Field(min_length=1, description="prompt files below `root`; those of several turns are taken")
    max_dialogues: Numbers = Field(
        description="maximum dialogues of each kind; each gives a prompt in each of four ways"
    )
    first: str = Field(min_length=1, description="Hugging Face Llama directory of the first model")
    second: str = Field(min_length=1, description="that of the second one")
    rewards: str = Field(min_length=1, description="round of the two reward models that choose the better answer")
    sampling: Sampling = Field(description="how answers are drawn; temperature 0: always the likeliest token")
    precision: Literal["fp32", "bf16"] = Field(description="weights and products")
    max_rows: int = Field(gt=0, description="answers generated at once; more need more memory")
    tokens_at_once: int = Field(gt=0, description="tokens scored at once; more take more memory")


class Chooser(NamedTuple):
    """Who chooses the better of two answers: a reward model for each kind of dialogue, with its tokenizer."""

    models: Mapping[Kind, tuple[RewardModel, Tokenizer]]
    tokens_at_once: int


def run(stage: Stage[Params]) -> dict[str, float]:
    """Take the dialogues, let both models play them in four ways, write the prompts."""
    params = stage.params
    dialogues = take_dialogues(params)
    figures: dict[str, float] = {"dialogues": len(dialogues)}
    lines: list[dict[str, Any]] = []
    if dialogues:
        played = play_all(stage, dialogues)
        for way in WAYS:
            own = [
                line_of(dialogues[number], way, answers)
                for number, answers in sorted(played[way].items())
                if len(answers) == num_turns(dialogues[number]) - 1
            ]
            figures[f"{way}/prompts"] = len(own)
            lines += own
    if stage.rank == 0:
        write_lines(stage.output / "prompts.jsonl", lines)
    return {**figures, "prompts": len(lines)}


def take_dialogues(params: Params) -> list[Prompt]:
    """Return the dialogues of several turns that are played; a digest of the id decides which.

    Raises ValueError when there are none of a kind that is asked for.
    """
    wanted = params.max_dialogues.model_dump()
    if not any(wanted.values()):
        return []
    prompts = read_prompts([Path(params.root) / name for name in params.prompts], "multi_turn.prompts")
    several = sorted(
        (prompt for prompt in prompts if num_turns(prompt) > 1), key=lambda prompt: number_of(f"multi_turn {prompt.id}")
    )
    taken: list[Prompt] = []
    for kind in KINDS:
        own = [prompt for prompt in several if kind_of(prompt.category, prompt.risk) == kind]
        if wanted[kind] and not own:
            raise ValueError(
                f"`multi_turn.prompts` holds no dialogue of several turns for {kind}: name other files, or set "
                f"`multi_turn.max_dialogues.{kind}` to 0"
            )
        taken += own[: wanted[kind]]
    return taken


def num_turns(prompt: Prompt) -> int:
    """Return how many turns of a dialogue are the user's."""
    return sum(message["role"] == "user" for message in prompt.messages)


def script_of(prompt: Prompt) -> Script:
    """Return what is said to the models: a dialogue without its answers, its last turn, too."""
    system = "".join(message["content"] for message in prompt.messages if message["role"] == "system")
    return Script(prompt.id, system, [each["content"] for each in prompt.messages if each["role"] == "user"])


def line_of(prompt: Prompt, way: Way, answers: Sequence[Drawn]) -> dict[str, Any]:
    """Return a dialogue with the models' answers as a prompt."""
    harm = {"risk": prompt.risk, "attack": prompt.attack, "difficulty": prompt.difficulty} if prompt.risk else {}
    return {
        "id": f"{way}-{prompt.id}",
        "asks": prompt.id,
        "gathered": way,
        "messages": messages_of(script_of(prompt), answers, len(answers)),
        "category": prompt.category,
        **harm,
    }


# --- playing ---


def play_all(stage: Stage[Params], dialogues: Sequence[Prompt]) -> Played:
    """Return the answers to all turns but the last, in each way, on every rank; each plays its share of the dialogues.

    Turns are saved below `stage.scratch`. Raises ValueError as `open_checkpoint` and `open_reward` do, and for a model
    that isn't named, or has another tokenizer than the reward models.
    """
    params = stage.params
    for name, checkpoint in (("first", params.first), ("second", params.second)):
        if Path(checkpoint) == NOTHING:
            raise ValueError(f"`multi_turn.{name}` is {NOTHING}: name a checkpoint, or set `max_dialogues` to 0")
    device = join_ranks()
    players = []
    for checkpoint in (params.first, params.second):
        model, tokenizer = open_checkpoint(Path(checkpoint), params.precision, device)
        players.append(Player(model, tokenizer, params.sampling, 1, params.max_rows, stage.seed, None, lambda *_: 0))
    models = {kind: open_reward(DATA / f"reward_{kind}" / params.rewards, params.precision, device) for kind in KINDS}
    for player in players:
        for _, tokenizer in models.values():
            check_same_tokenizer(tokenizer, player.tokenizer)
    chooser = Chooser(models, params.tokens_at_once)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = range(rank, len(dialogues), world)
    played: Played = {way: {number: [] for number in own} for way in WAYS}
    for turn in range(max(map(num_turns, dialogues)) - 1):
        saved = stage.scratch / "turns" / f"{world}-{rank}-{turn}.json"
        if not saved.exists():
            write_json(saved, take_turn_in_all_ways(players, chooser, dialogues, played, turn))
        for way, number, *drawn in read_json(saved):
            played[way][number].append(Drawn(*drawn))
    return {way: dict(enumerate(from_all_ranks(answers))) for way, answers in played.items()}


def take_turn_in_all_ways(
    players: Sequence[Player], chooser: Chooser, dialogues: Sequence[Prompt], played: Played, turn: int
) -> list[tuple[Way, int, str, bool]]:
    """Return the answers of one turn that is not the last: way, number of the dialogue, text, whether it was ended."""
    first, second = players
    scripts = [script_of(prompt) for prompt in dialogues]
    taken: list[tuple[Way, int, str, bool]] = []
    going = {
        way: {number: drawn for number, drawn in own.items() if turn < num_turns(dialogues[number]) - 1}
        for way, own in played.items()
    }
    beginning = {number: drawn for number, drawn in going["alternating"].items() if (number + turn) % 2 == 0}
    others = {number: drawn for number, drawn in going["alternating"].items() if (number + turn) % 2}
    alone: list[tuple[Way, Player, dict[int, list[Drawn]]]] = [
        ("first", first, going["first"]),
        ("second", second, going["second"]),
        ("alternating", first, beginning),
        ("alternating", second, others),
    ]
    for way, player, own in alone:
        taken += [(way, *answer) for answer in take_turn(player, scripts, own, turn)]
    both = [
        {answer[0]: Drawn(*answer[1:]) for answer in take_turn(player, scripts, going["better"], turn)}
        for player in players
    ]
    answered = [number for number in both[0] if number in both[1]]
    asked = [messages_of(scripts[number], going["better"][number], turn) for number in answered]
    kinds = [kind_of(dialogues[number].category, dialogues[number].risk) for number in answered]
    for number, choice in zip(answered, choices(chooser, asked, kinds, both, answered), strict=True):
        taken.append(("better", number, *both[choice][number]))
    return taken


def choices(
    chooser: Chooser,
    asked: Sequence[Sequence[Message]],
    kinds: Sequence[Kind],
    both: Sequence[Mapping[int, Drawn]],
    numbers: Sequence[int],
) -> list[int]:
    """Return which of two answers to each prompt, 0 or 1, has the higher score; equal ones: the first.

    An answer that leaves the reward model no room loses.
    """
    found = [0] * len(asked)
    for kind, (model, tokenizer) in chooser.models.items():
        context = model.config.max_position_embeddings
        places = [place for place, own in enumerate(kinds) if own == kind]
        dialogues = [
            encode_dialogue(
                [*asked[place], Message(role="assistant", content=drawn[numbers[place]].text)], tokenizer
            ).ids
            for place in places
            for drawn in both
        ]
        fitting = [ids for ids in dialogues if len(ids) <= context]
        scores = iter(score(model, fitting, chooser.tokens_at_once)) if fitting else iter([])
        values = [next(scores) if len(ids) <= context else float("-inf") for ids in dialogues]
        for place, this, that in zip(places, values[::2], values[1::2], strict=True):
            found[place] = int(that > this)
    return found


if __name__ == "__main__":
    start(Params, run)
