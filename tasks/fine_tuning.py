"""Make a round's version of the chat model: learn the best samples, with demonstrations (Llama 2, section 3.2.3).

Run once for each round (`fine_tuning@v1`); the code is in tasks/learning/answers.py. Every version starts from the same
model, `init_from`, and learns the best samples of all rounds so far, as in ReST-EM (Singh et al. 2023): one that
started from the version before would learn the mistakes in its own samples again each round. Reads that model,
best.jsonl of the round's rejection sampling, the best samples of all rounds so far, demonstrations, the dialogues of
`ghost_attention` and of `context_distillation` where the round has them, and the evaluation's prompts. Writes the
version, a chat model like that of `sft`.

A round whose rejection sampling asked no prompts and had no earlier samples has no version: demonstrations alone would
be no news. Then nothing but metrics.json is written, with 0 steps.
"""

from __future__ import annotations

from pathlib import Path

from tasks.learning.answers import train
from tasks.learning.versions import Params, folders_of, joined_of
from tasks.reading.rounds import round_of
from tasks.running.places import DATA
from tasks.running.stage import Stage, start


def run(stage: Stage[Params]) -> dict[str, float]:
    """Train, validate, sample, save; nothing of it where there is nothing to learn from."""
    place = round_of(stage.name)
    samples = DATA / "rejection_sampling" / place.name / "best.jsonl"
    if samples.is_file() and samples.stat().st_size == 0:  # nothing was asked: else the stage before would have failed
        return {"steps": 0}
    folders = folders_of(stage.params, samples, joined_of(place.round))
    return train(stage, Path(stage.params.init_from), folders, num_steps=None, notes={})


if __name__ == "__main__":
    start(Params, run)
