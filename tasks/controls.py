"""Train what a version of the chat model is compared with: same start, same number of steps, other answers.

A gain over the version's start may come from further steps alone, or from any samples. A control tells: it learns from
demonstrations alone, from one random sample of each prompt in place of the best, or once more from the best samples
that the version before learnt from. One without the round's Ghost Attention, or without its context distillation, tells
what that is worth; it makes as many passes over what is left. A version that PPO made is compared with one that went on
learning samples.

Run once for each control (`controls@v1_random`), with the parameters of section `fine_tuning`; the code is in
tasks/learning/answers.py. Reads the start, the samples, demonstrations, the evaluation's prompts, and the version's
metrics.json for its number of steps. Writes a chat model like that of `sft`, whose training.json says `control_of`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, Self

from pydantic import ConfigDict, Field, RootModel, model_validator

from tasks.learning import versions
from tasks.learning.answers import train
from tasks.learning.versions import folders_of, joined_of
from tasks.running.files import read_json
from tasks.running.params import Section, parse_section, read_params
from tasks.running.places import NOTHING
from tasks.running.stage import Stage, start


class Control(Section):
    """One control of a version."""

    init_from: str = Field(min_length=1, description="Hugging Face Llama directory where its version started")
    steps_of: str = Field(min_length=1, description="directory of the version, whose number of steps it takes")
    samples: str = Field(min_length=1, description="directory of a round's samples; data/seeds/none: no samples")
    answers: Literal["none", "random", "best"] = Field(description="samples that are learnt beside demonstrations")
    length: Literal["steps", "passes"] = Field(
        description="train for as many steps as the version, or for as many passes over what this one learns"
    )
    ghost_attention: str = Field(min_length=1, description=f"as in the version's round, or {NOTHING} to leave it out")
    context_distillation: str = Field(min_length=1, description=f"as in the version's round, or {NOTHING}")

    @model_validator(mode="after")
    def _has_what_it_learns(self) -> Self:
        if (self.answers == "none") != (Path(self.samples) == NOTHING):
            raise ValueError(
                f"answers {self.answers} with samples {self.samples}: `none` goes with {NOTHING}, `random` and `best` "
                "with the directory of a round's samples"
            )
        return self


class Params(RootModel[dict[str, Control]]):
    """The controls, by the name of the stage's entry."""

    model_config = ConfigDict(frozen=True)


def run(stage: Stage[Params]) -> dict[str, float]:
    """Train as the version was, on other answers."""
    control = control_of(stage)
    params = parse_section(versions.Params, read_params(), versions.SECTION)
    samples = None if control.answers == "none" else Path(control.samples) / f"{control.answers}.jsonl"
    # messages then name the section whose values are used
    as_version: Stage[versions.Params] = replace(stage, name=f"{versions.SECTION}@{stage.entry}", params=params)  # type: ignore[arg-type, assignment]
    notes = {"control_of": control.steps_of}
    num_steps = steps_of(Path(control.steps_of))
    # without long dialogues, as many steps would be more passes over the others, and teach them better
    limit = num_steps if control.length == "steps" else None
    return train(as_version, Path(control.init_from), folders_of(params, samples, joined_of(control)), limit, notes)


def control_of(stage: Stage[Params]) -> Control:
    """Return the control that this run of the stage is about.

    Raises ValueError when params.yaml doesn't have it.
    """
    name, known = stage.entry, stage.params.root
    if name not in known:
        entries = ", ".join(f"controls@{entry}" for entry in known) or "none"
        raise ValueError(f"params.yaml: `controls` has no `{name}`: it has {entries}")
    return known[name]


def steps_of(version: Path) -> int:
    """Return how many steps a version was trained. Raises ValueError when it was not, or had no samples."""
    path = version / "metrics.json"
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: a control takes as many steps as its version; run {version.parent.name}@{version.name}"
        )
    steps = int(read_json(path)["steps"])
    if not steps:
        raise ValueError(
            f"{version} is no version, as its round's rejection sampling asked no prompts: take its controls out of "
            "`controls` and `evaluate.checkpoints`, or raise `rejection_sampling.max_prompts`"
        )
    return steps


if __name__ == "__main__":
    start(Params, run)
