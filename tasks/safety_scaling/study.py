"""What the study `safety_scaling` trains, and what it tries the models on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from tasks.judging import answering
from tasks.judging.answering import Known
from tasks.judging.scales import Fitted
from tasks.reading.prompts import Kind, Prompt, is_adversarial
from tasks.reading.rounds import NAME
from tasks.running.params import Section

BORDERLINE = "borderline"  # the category of prompts that only look unsafe


class Params(Section):
    """Which models are trained on how much safety data, and how they are tried."""

    init_from: str = Field(min_length=1, description="Hugging Face Llama directory from which every model starts")
    samples: str = Field(min_length=1, description="directory of rejection samples, with best.jsonl")
    rewards: str = Field(pattern=NAME.pattern, description="round whose reward models score the answers")
    shares: list[float] = Field(min_length=1, description="shares of the samples about safety, from 0 to 1")
    num_seeds: int = Field(gt=1, description="trainings for each share")
    max_prompts: int | None = Field(gt=0, description="prompts of each of the evaluation's files; null: all")
    tokens_at_once: int = Field(gt=0, description="tokens scored at once; more need more memory")


class Samples(NamedTuple):
    """What may be learnt beside the demonstrations: dialogues that are too long or asked by the evaluation are gone."""

    helpful: list[dict[str, Any]]
    safe: list[dict[str, Any]]
    num_demonstrations: int


class Training(NamedTuple):
    """One training: so many of the samples about safety, drawn by a seed."""

    share: float
    num_safe: int
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder in the scratch."""
        return f"{self.num_safe}_safe/{self.seed}"


class Trial(NamedTuple):
    """What the models are tried on, and by what."""

    values: answering.Params
    prompts: list[Prompt]
    num_too_long: int  # left out: no room for an answer
    rewards: Mapping[Kind, Path]
    fitted: Fitted
    known: Known | None


def group_of(prompt: Prompt) -> str:
    """Return what a prompt shows: safety, helpfulness, or whether what only looks unsafe is refused."""
    if is_adversarial(prompt.category, prompt.risk):
        return "safety"
    return BORDERLINE if prompt.category == BORDERLINE else "helpfulness"
