"""Let a checkpoint play the evaluation's conversations, each under an instruction given once (Llama 2, section 3.3).

The instruction is the system message, the user's turns are given, and the model reads its own answers; `consistency`
judges them. A conversation ends where the context is full, or at an answer that no dialogue can hold: one that is empty
or has a tag. Of the first one that was answered the attention is kept, for the picture.

Run once for each checkpoint (`conversations@v3`). Reads the checkpoint and the conversations.
Writes answers.jsonl and attention.csv (the highest weight over all layers and heads, of bins of neighbouring tokens,
from each bin to each).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from model.inspecting.attention import highest_attention
from model.network.checkpoint import open_checkpoint
from model.network.ranks import join_ranks
from model.sampling.sampler import Sampling
from model.text.dialogue import Message, check, encode_dialogue
from tasks.conversing.playing import Player, Script, messages_of, play
from tasks.running.files import write_lines
from tasks.running.params import Section
from tasks.running.stage import Stage, start

BIN = 8  # neighbouring tokens that are one place of the picture (the paper bins them, too)


class Params(Section):
    """Which checkpoints play which conversations, and how."""

    checkpoints: dict[str, str] = Field(description="Hugging Face Llama directory of each, by its name")
    file: str = Field(min_length=1, description="conversations, each under an instruction, JSON lines")
    sampling: Sampling = Field(description="how answers are drawn; temperature 0: always the likeliest token")
    precision: Literal["fp32", "bf16"] = Field(description="weights and products")
    max_rows: int = Field(gt=0, description="answers generated at once; more need more memory")


def run(stage: Stage[Params]) -> dict[str, float]:
    """Play all conversations, write the answers and the attention in the first one."""
    params = stage.params
    if stage.entry not in params.checkpoints:
        names = ", ".join(f"conversations@{name}" for name in params.checkpoints)
        raise ValueError(f"`conversations.checkpoints` has no `{stage.entry}`: play one of {names}")
    scripts = read_scripts(Path(params.file))
    model, tokenizer = open_checkpoint(Path(params.checkpoints[stage.entry]), params.precision, join_ranks())
    player = Player(model, tokenizer, params.sampling, 1, params.max_rows, stage.seed, None, lambda *_: 0)
    played = play(player, scripts, stage.scratch / "turns", stage.name if stage.rank == 0 else None)
    if stage.rank == 0:
        lines = (
            {"id": script.id, "instruction": script.system, "turns": list(script.turns), "answers": list(answers)}
            for script, answers in zip(scripts, played, strict=True)
        )
        write_lines(stage.output / "answers.jsonl", lines)
        for script, answers in [each for each in zip(scripts, played, strict=True) if each[1]][:1]:
            messages = messages_of(script, answers, len(answers) - 1)
            ids = encode_dialogue([*messages, {"role": "assistant", "content": answers[-1].text}], tokenizer).ids
            write_attention(stage.output / "attention.csv", binned(highest_attention(model, ids)))
    return {
        "conversations": len(scripts),
        "turns": sum(len(script.turns) for script in scripts),
        "answers": sum(len(answers) for answers in played),
        "finished": sum(answer.finished for answers in played for answer in answers),
    }


def read_scripts(path: Path) -> list[Script]:
    """Return the conversations.

    Raises ValueError for a file that is missing or empty, and for a line that is no conversation of two turns or more.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing: correct `conversations.file`, or run the stage that writes it")
    scripts: dict[str, Script] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                script = _script_of(json.loads(line))
                if script.id in scripts:
                    raise ValueError(f"its id {script.id} belongs to another one too")
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is no conversation: {error}") from None
            scripts[script.id] = script
    if not scripts:
        raise ValueError(f"{path} holds no conversation: fill it, or correct `conversations.file`")
    return list(scripts.values())


def _script_of(values: Any) -> Script:
    match values:
        case {"id": str(name), "instruction": str(instruction), "turns": [str(), str(), *_] as turns}:
            script = Script(name, instruction, turns)
        case _:
            raise ValueError("it needs `id`, `instruction`, and two `turns` or more, all texts")
    for turn in script.turns:
        if not isinstance(turn, str):
            raise ValueError(f"it needs texts for turns, and has {turn!r}")
        check([Message(role="system", content=script.system), Message(role="user", content=turn)])
    return script


def binned(highest_TT: Tensor) -> Tensor:
    """Return the highest weights of bins of neighbouring tokens (B, B); the last bin is shorter."""
    size = -(-len(highest_TT) // BIN)
    padded = torch.zeros((size * BIN, size * BIN))
    padded[: len(highest_TT), : len(highest_TT)] = highest_TT
    return padded.view(size, BIN, size, BIN).amax(dim=(1, 3))


def write_attention(path: Path, weights: Tensor) -> None:
    """Write a square of weights as numbers with three decimals."""
    path.write_text("".join(",".join(f"{weight:.3f}" for weight in row) + "\n" for row in weights.tolist()))


if __name__ == "__main__":
    start(Params, run)
