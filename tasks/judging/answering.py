"""A checkpoint's answers to the prompts of section `evaluate` of params.yaml, and what the truth says of them.

Answers are drawn with random numbers of each prompt's own, the same for all checkpoints: these differ by their weights,
not by luck.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field

from model.network.ranks import from_all_ranks
from model.network.transformer import Llama
from model.sampling.sampler import Sampling, sample
from model.text.dialogue import decode_answer, encode_prompt
from model.text.tokenizer import Tokenizer
from tasks.judging.intervals import mean_interval, wilson
from tasks.reading.prompts import KINDS, Prompt, is_adversarial, kind_of
from tasks.running.digests import number_of
from tasks.running.files import read_json, write_json
from tasks.running.names import metric_name
from tasks.running.params import Section
from tasks.running.stage import Stage
from tasks.world.annotators import Annotator, mean_utility
from tasks.world.judge import Judgement, Truth, judge

HEADLINES = (
    "well_formed",
    "helpfulness/right",
    "helpfulness/false_refusals",
    "factual/right",
    "factual/held_out/right",
    "safety/violations",
    "borderline/false_refusals",
    "instruction/followed",
)
SHARD = 256  # prompts that a rank answers between two saves


class Params(Section):
    """Which checkpoints answer which prompts, and how."""

    checkpoints: dict[str, str] = Field(
        min_length=1, description="Hugging Face Llama directory of each checkpoint, by the name of its evaluation"
    )
    root: str = Field(min_length=1, description="directory of the prompt files, which DVC watches")
    prompts: list[str] = Field(min_length=1, description="prompt files below `root`, JSON lines")
    truth: str | None = Field(description="directory of what the judge knows; null: answers are not judged")
    sampling: Sampling = Field(description="how answers are drawn; temperature 0: always the likeliest token")
    precision: Literal["fp32", "bf16"] = Field(description="weights and products")
    max_rows: int = Field(gt=0, description="answers generated at once; more need more memory")


class Answer(NamedTuple):
    """What a checkpoint answered; without tokens if the prompt left no room in the context."""

    text: str
    num_tokens: int
    finished: bool


class Known(NamedTuple):
    """What answers are judged by: the truth, and the annotators whose utilities are averaged."""

    truth: Truth
    annotators: Mapping[str, Annotator]


class Judged(NamedTuple):
    """A prompt, its answer, and what the truth says of them; `held_out`: it asks for a fact of a held-out entity."""

    prompt: Prompt
    answer: Answer
    judgement: Judgement | None
    utility: float | None
    held_out: bool


class Share(NamedTuple):
    """How many of how many prompts, and the share with its 95% interval."""

    hits: int
    prompts: int
    share: float
    low: float
    high: float


# --- answers ---


def answer_all(
    stage: Stage[Any], params: Params, model: Llama, tokenizer: Tokenizer, prompts: Sequence[Prompt]
) -> list[Answer]:
    """Return the answer to each prompt; the ranks share the prompts, and each gets all answers.

    They are saved every few hundred prompts below `stage.scratch`, and a stopped run goes on after those.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    context = model.config.max_position_embeddings
    encoded = {
        number: encode_prompt(prompts[number].messages, tokenizer) for number in range(rank, len(prompts), world)
    }
    fitting = [number for number, ids in encoded.items() if len(ids) < context]
    own = {number: Answer("", 0, finished=False) for number in encoded}
    for first in range(0, len(fitting), SHARD):
        numbers = fitting[first : first + SHARD]
        saved = stage.scratch / "answers" / f"{rank}-{first}.json"
        if not saved.exists():
            started = time.monotonic()
            responses = sample(
                model,
                [encoded[number] for number in numbers],
                params.sampling,
                num_samples=1,
                eos_id=tokenizer.eos_id,
                seeds=[number_of(f"{stage.seed} evaluate {prompts[number].id}") for number in numbers],
                max_rows=params.max_rows,
                description=f"{stage.name} {first + len(numbers)} of {len(fitting)}" if rank == 0 else None,
            )
            num_tokens = sum(len(response.ids) for (response,) in responses)
            stage.log({"tokens_per_second": num_tokens / (time.monotonic() - started)}, step=first + len(numbers))
            write_json(saved, [[response.ids, response.finished] for (response,) in responses])
        for number, (ids, finished) in zip(numbers, read_json(saved), strict=True):
            own[number] = Answer(decode_answer(ids, tokenizer), len(ids), finished)
    return from_all_ranks(own)


# --- figures ---


def judge_answer(prompt: Prompt, answer: Answer, known: Known | None) -> Judged:
    """Judge an answer, if there is a truth to judge it against."""
    if known is None:
        return Judged(prompt, answer, judgement=None, utility=None, held_out=False)
    judgement = judge(known.truth, prompt.id, answer.text, answer.finished)
    utility = mean_utility(known.truth, known.annotators, prompt.id, answer.text, answer.finished)
    return Judged(prompt, answer, judgement, utility, known.truth.prompts[prompt.id].held_out)


def outcomes_of(judged: Judged) -> dict[str, bool]:
    """Return the figures that one answer counts for, and whether it is a hit in each."""
    prompt, answer, judgement, held_out = judged.prompt, judged.answer, judged.judgement, judged.held_out
    category = metric_name(prompt.category)
    if judgement is None:
        well_formed = answer.finished and bool(answer.text)
        return {"well_formed": well_formed, f"{category}/well_formed": well_formed}
    found = {"well_formed": judgement.well_formed, f"{category}/well_formed": judgement.well_formed}
    if judgement.right is not None:
        found[f"{category}/right"] = judgement.right
        if category == "factual":
            found[f"factual/{'held_out' if held_out else 'known'}/right"] = judgement.right
    if judgement.follows is not None:
        found[f"{category}/followed"] = judgement.follows
    if not is_adversarial(prompt.category, prompt.risk):
        if judgement.right is not None:
            found["helpfulness/right"] = judgement.right
        found["helpfulness/false_refusals"] = found[f"{category}/false_refusals"] = judgement.refuses
        return found
    found["safety/refused"] = judgement.refuses
    found["safety/violations"] = not judgement.safe
    for kind, value in (("risk", prompt.risk), ("attack", prompt.attack), ("difficulty", prompt.difficulty)):
        if value is not None:
            found[metric_name("safety", kind, str(value), "violations")] = not judgement.safe
    return found


def utilities_of(judged: Sequence[Judged]) -> dict[str, float]:
    """Return the mean utility of the answers to adversarial prompts, and to all others; none without a truth."""
    figures: dict[str, float] = {}
    for name in KINDS:
        own = [each for each in judged if kind_of(each.prompt.category, each.prompt.risk) == name]
        values = [each.utility for each in own if each.utility is not None]
        if values:
            figures[f"{name}/utility"] = fmean(values)
        if len(values) > 1:
            figures[f"{name}/utility/low"], figures[f"{name}/utility/high"] = mean_interval(values)
    return figures


def shares_of(outcomes: Iterable[Mapping[str, bool]]) -> dict[str, Share]:
    """Return each figure's share, by name, the headlines first."""
    found: dict[str, list[bool]] = defaultdict(list)
    for outcome in outcomes:
        for name, hit in outcome.items():
            found[name].append(hit)
    shares = {}
    for name in sorted(found, key=lambda name: (name not in HEADLINES, name)):
        hits, prompts = sum(found[name]), len(found[name])
        shares[name] = Share(hits, prompts, hits / prompts, *wilson(hits, prompts))
    return shares


def figures_of(shares: Mapping[str, Share]) -> dict[str, float]:
    """Return the shares as metrics, the headlines with their intervals."""
    figures = {}
    for name, share in shares.items():
        figures[name] = share.share
        if name in HEADLINES:
            figures |= {f"{name}/low": share.low, f"{name}/high": share.high}
    return figures
