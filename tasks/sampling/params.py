"""How answers to prompts are drawn, scored and chosen: section `rejection_sampling` of params.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from tasks.judging.ranking import Scales
from tasks.reading.prompts import KINDS, Kind, Prompt
from tasks.reading.shares import Numbers
from tasks.reading.taking import Asking
from tasks.running.params import Section
from tasks.running.places import DATA
from tasks.sampling.choosing import Choice, choose
from tasks.sampling.drawing import Candidate, Job, Settings

SECTION = "rejection_sampling"


class Samples(Section):
    """How many answers to a prompt of each kind."""

    helpfulness: int = Field(gt=0, description="samples a prompt; 1: nothing is chosen")
    safety: int = Field(gt=0, description="samples a prompt; 1: nothing is chosen")


class Weights(Section):
    """How much an answer's log-probability counts beside its reward, for each kind of prompt."""

    helpfulness: float = Field(ge=0, description="log-odds for each nat of log-probability; 0: off")
    safety: float = Field(ge=0, description="log-odds for each nat of log-probability; 0: off")


class Drawn(Section):
    """How answers are drawn and scored."""

    top_p: float = Field(gt=0, le=1, description="draw among the likeliest tokens with this total probability; 1: all")
    top_k: int = Field(ge=0, description="draw among this many of the likeliest tokens; 0: all")
    max_new_tokens: int = Field(gt=0, description="maximum tokens of an answer, EOS included")
    precision: Literal["fp32", "bf16"] = Field(description="weights and products")
    max_rows: int = Field(gt=0, description="answers drawn at once; more need more memory")
    tokens_at_once: int = Field(gt=0, description="tokens scored at once; more need more memory")
    save_every: int = Field(gt=0, description="prompts between two saves")


class Params(Asking, Drawn):
    """Which prompts are asked, how answers are drawn, scored and chosen."""

    num_search_prompts: Numbers = Field(description="further prompts of one round, to search the temperature on")
    num_samples: Samples = Field(description="answers drawn to each prompt")
    temperatures: list[float] = Field(min_length=1, description="those that are tried; one: there is no search")
    threshold_precision: float = Field(gt=0, le=1, description="share of answers called unsafe that must be")
    log_probability_weight: Weights = Field(description="against over-optimised rewards")
    truth: str | None = Field(description="directory of what the judge knows, for the report; null: none")

    @model_validator(mode="after")
    def _is_searchable(self) -> Self:
        if min(self.temperatures) <= 0:
            raise ValueError(f"`temperatures` {self.temperatures}: answers that are all the likeliest are all the same")
        missing = [
            kind for kind in KINDS if getattr(self.max_prompts, kind) and not getattr(self.num_search_prompts, kind)
        ]
        if len(set(self.temperatures)) > 1 and missing:
            raise ValueError(
                f"`temperatures` has several to choose from, and `num_search_prompts.{missing[0]}` is 0: there is no "
                "prompt to try them on"
            )
        return self


def settings_of(params: Drawn, policy: Path, round_name: str, seed: int, scratch: Path) -> Settings:
    """Return how everything is drawn from a policy and scored by a round's reward models."""
    return Settings(
        policy=policy,
        rewards={kind: DATA / f"reward_{kind}" / round_name for kind in KINDS},
        round_name=round_name,
        seed=seed,
        top_p=params.top_p,
        top_k=params.top_k,
        max_new_tokens=params.max_new_tokens,
        precision=params.precision,
        max_rows=params.max_rows,
        tokens_at_once=params.tokens_at_once,
        save_every=params.save_every,
        scratch=scratch,
    )


def job_of(params: Params, kind: Kind, temperature: float, prompts: Sequence[Prompt], purpose: str) -> Job:
    """Return what is to be drawn for one kind at one temperature."""
    return Job(f"{purpose}-{kind}-{temperature}", kind, temperature, getattr(params.num_samples, kind), prompts)


def choices_of(
    params: Params, job: Job, found: Sequence[Sequence[Candidate]], scales: Scales, seed: int
) -> list[Choice]:
    """Return what is chosen for each prompt of a job, among the candidates found."""
    weight = getattr(params.log_probability_weight, job.kind)
    return [
        choose(job.kind, prompt, job.temperature, own, scales, weight, seed)
        for prompt, own in zip(job.prompts, found, strict=True)
    ]
