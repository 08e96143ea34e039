"""Teach the base model to answer, with demonstrations (Llama 2, section 3.1); the code is in tasks/learning/answers.py.

An intermediate checkpoint is kept: the first preferences need an earlier variant of the model (section 3.2.1).

Reads a Hugging Face Llama directory with its tokenizer (`init_from`), dialogues below `root`, and the evaluation's
prompts. Writes a chat model; in early/ the earlier variant, a directory of the same kind.
"""

from __future__ import annotations

import math
import shutil
from functools import partial
from pathlib import Path

from pydantic import Field

from tasks.learning import answers
from tasks.learning.answers import Folder, Training, finish, learn, prepare, save
from tasks.running.stage import Stage, start

EARLY = "early"


class Params(answers.Params):
    """The demonstrations, how they are learnt, and what is watched and kept on the way."""

    init_from: str = Field(min_length=1, description="Hugging Face Llama directory to start from, with its tokenizer")
    num_ranks: int | None = Field(gt=0, description="processes on this host; null: `machine.num_ranks`")
    early_share: float = Field(gt=0, lt=1, description="share of the steps after which early/ is saved")


def run(stage: Stage[Params]) -> dict[str, float]:
    """Train, validate, sample, save."""
    params = stage.params
    folders = [Folder(Path(params.root), params.sources)]
    training = prepare(stage, Path(params.init_from), folders, num_steps=None)
    learn(training, after={math.ceil(params.early_share * len(training.steps)): partial(save_early, training)})
    figures = finish(training, notes={})
    if stage.rank == 0:
        shutil.copytree(stage.scratch / EARLY, stage.output / EARLY)  # not moved: the run may still be killed
    return figures


def save_early(training: Training) -> None:
    """Save the current model for the end, beside the states: a resumed run starts with an empty output."""
    directory = training.stage.scratch / EARLY
    if training.stage.rank == 0:
        shutil.rmtree(directory, ignore_errors=True)  # left if a run was stopped between this and its next state
    save(training, directory, notes={})


if __name__ == "__main__":
    start(Params, run)
