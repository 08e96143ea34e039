"""A checkpoint's answers to the prompts of section `evaluate` of params.yaml, and what the truth says of them.

Answers are drawn with random numbers of each prompt's own, the same for all checkpoints: these differ by their weights,
not by luck.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field

from model.network.ranks import from_all_ranks
from model.network.transformer import Llama
from model.sampling.sampler import Sampling, sample
from model.text.dialogue import decode_answer, encode_prompt
from model.text.tokenizer import Tokenizer
from tasks.reading.prompts import Kind, Prompt, kind_of
from tasks.running.digests import number_of
from tasks.running.files import read_json, write_json
from tasks.running.params import Section
from tasks.running.places import NOTHING
from tasks.running.stage import Stage
from tasks.world.annotators import Annotator, mean_utility, view
from tasks.world.judge import Judgement, Truth, judge, safety_points

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
    gathered: str = Field(min_length=1, description=f"directory of stage `multi_turn`, or {NOTHING}")
    num_raters: int = Field(gt=0, description="simulated annotators who rate each answer, where there is a truth")
    text: str = Field(min_length=1, description=f"directory of stage `tokenize`, for perplexity, or {NOTHING}")
    text_tokenizer: str = Field(min_length=1, description=f"SentencePiece model of that text, or {NOTHING}")
    max_text_tokens: int = Field(gt=0, description="maximum tokens of each source's held-out text that are read")
    tokens_at_once: int = Field(gt=0, description="tokens of text read at once; more take more memory")


class Answer(NamedTuple):
    """What a checkpoint answered; without tokens if the prompt left no room in the context."""

    text: str
    num_tokens: int
    finished: bool


class Known(NamedTuple):
    """What answers are judged by: the truth, and the annotators whose utilities are averaged."""

    truth: Truth
    annotators: Mapping[str, Annotator]


class Rating(NamedTuple):
    """How an annotator sees an answer; `points`: on five, of one to an adversarial prompt."""

    utility: float
    safe: bool
    points: int | None


class Judged(NamedTuple):
    """A prompt, its answer, and what the truth says of them.

    `held_out`: it asks for a fact of a held-out entity. `rating`: on five points, of an answer to an adversarial
    prompt. `raters`: how annotators see it. `gathered`: the way in which the dialogue's earlier answers were gathered.
    """

    prompt: Prompt
    answer: Answer
    judgement: Judgement | None
    utility: float | None
    held_out: bool
    rating: int | None = None
    raters: Mapping[str, Rating] | None = None
    gathered: str | None = None

    @property
    def kind(self) -> Kind:
        """What the answer is judged for."""
        return kind_of(self.prompt.category, self.prompt.risk)


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


# --- judgements ---


def judge_answer(prompt: Prompt, answer: Answer, known: Known | None) -> Judged:
    """Judge an answer, if there is a truth to judge it against."""
    if known is None:
        return Judged(prompt, answer, judgement=None, utility=None, held_out=False)
    judgement = judge(known.truth, prompt.id, answer.text, answer.finished)
    utility = mean_utility(known.truth, known.annotators, prompt.id, answer.text, answer.finished)
    rating = None
    if kind_of(prompt.category, prompt.risk) == "safety":
        rating = safety_points(known.truth, judgement, answer.text, judgement.safe)
    return Judged(prompt, answer, judgement, utility, known.truth.prompts[prompt.id].held_out, rating)


def rate_answer(judged: Judged, known: Known, num_raters: int, seed: int) -> Judged:
    """Let annotators rate a judged answer; the prompt alone decides who they are.

    Raises ValueError when there are fewer annotators than asked for.
    """
    if num_raters > len(known.annotators):
        raise ValueError(
            f"params.yaml: `evaluate.num_raters` is {num_raters}, and `preferences.simulated.annotators` has "
            f"{len(known.annotators)}: lower the one, or add to the other"
        )
    prompt, answer = judged.prompt, judged.answer
    assert judged.judgement is not None
    raters = {}
    names = sorted(known.annotators)
    for name in sorted(random.Random(f"{seed} raters {prompt.id}").sample(names, num_raters)):
        seen = view(known.truth, name, known.annotators[name], prompt.id, answer.text, answer.finished, seed)
        points = None
        if judged.kind == "safety":
            points = safety_points(known.truth, judged.judgement, answer.text, seen.safe)
        raters[name] = Rating(seen.utility, seen.safe, points)
    return judged._replace(raters=raters)
