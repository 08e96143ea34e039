"""What a version of the chat model learns from: the best samples, and demonstrations (Llama 2, section 3.2.3).

Of a sampled answer's dialogue only that answer is new: with the samples' `loss` of `last`, earlier turns are only read.
A round may have data sets of its own beside them: dialogues that keep an instruction (section 3.3, Ghost Attention),
where `last` means that no token of an earlier turn is learnt, and safe answers (section 4.2.4, context distillation).
Demonstrations beside the samples, and the samples of all earlier rounds among them, keep the model from forgetting.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from tasks.learning import answers
from tasks.learning.answers import Folder
from tasks.reading.dialogues import DialogueSource, Use
from tasks.reading.rounds import JOINED
from tasks.running.places import NOTHING

SECTION = "fine_tuning"
SAMPLES = "samples"
DIALOGUES = "dialogues.jsonl"


class Params(answers.Params):
    """The demonstrations and the samples, how they are learnt, and what is watched on the way."""

    init_from: str = Field(min_length=1, description="Hugging Face Llama directory from which every version starts")
    samples: Use = Field(description="how the round's samples are used, beside the sources")
    ghost_attention: Use = Field(description="how the dialogues that keep an instruction are used, where there are any")
    context_distillation: Use = Field(description="how the distilled safe answers are used, where there are any")

    @model_validator(mode="after")
    def _samples_are_not_a_source(self) -> Self:
        for name in (SAMPLES, *JOINED):
            if name in self.sources:
                raise ValueError(f"a source can't be called `{name}`, as what rounds have of their own is: rename it")
        return self


def folders_of(params: Params, samples: Path | None, joined: Mapping[str, Path]) -> list[Folder]:
    """Return what is to be read: the demonstrations, a file of samples where there is one, and what joins them.

    `joined`: directory of each data set, by its stage; data/seeds/none: there is none.
    Raises ValueError when a file is missing, and when there is no sample.
    """
    folders = [Folder(Path(params.root), params.sources)]
    files = {} if samples is None else {SAMPLES: (samples, "rejection_sampling")}
    files |= {name: (root / DIALOGUES, name) for name, root in joined.items() if root != NOTHING}
    for name, (path, stage) in files.items():
        if not path.is_file() or (name == SAMPLES and path.stat().st_size == 0):
            raise ValueError(f"{path} holds no {name}: run the stage {stage} that writes it, on prompts")
        if path.stat().st_size:  # a stage that found nothing to learn says so itself
            source = DialogueSource(files=[path.name], format="messages", **getattr(params, name).model_dump())
            folders.append(Folder(path.parent, {name: source}))
    return folders


def joined_of(own: Any) -> dict[str, Path]:
    """Return the directories of the data sets that join samples, by their stage."""
    return {name: Path(getattr(own, name)) for name in JOINED}
