"""What a version of the chat model learns from: the best samples, and demonstrations (Llama 2, section 3.2.3).

Of a sampled answer's dialogue only that answer is new: with the samples' `loss` of `last`, earlier turns are only read.
Demonstrations beside the samples, and the samples of all earlier rounds among them, keep the model from forgetting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from tasks.learning import answers
from tasks.learning.answers import Folder
from tasks.reading.dialogues import DialogueSource, Use

SECTION = "fine_tuning"
SAMPLES = "samples"


class Params(answers.Params):
    """The demonstrations and the samples, how they are learnt, and what is watched on the way."""

    init_from: str = Field(min_length=1, description="Hugging Face Llama directory from which every version starts")
    samples: Use = Field(description="how the round's samples are used, beside the sources")

    @model_validator(mode="after")
    def _samples_are_not_a_source(self) -> Self:
        if SAMPLES in self.sources:
            raise ValueError(f"a source can't be called `{SAMPLES}`, as the round's samples are: rename it")
        return self


def folders_of(params: Params, samples: Path | None) -> list[Folder]:
    """Return what is to be read: the demonstrations, and a file of samples where there is one.

    Raises ValueError when that file is missing or empty.
    """
    demonstrations = Folder(Path(params.root), params.sources)
    if samples is None:
        return [demonstrations]
    if not samples.is_file() or samples.stat().st_size == 0:
        raise ValueError(f"{samples} holds no samples: run the stage rejection_sampling that writes it, on prompts")
    source = DialogueSource(files=[samples.name], format="messages", **params.samples.model_dump())
    return [demonstrations, Folder(samples.parent, {SAMPLES: source})]
