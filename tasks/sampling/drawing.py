"""Draw answers to prompts and score them, in shards that a stopped stage doesn't draw or score again.

A shard is a few prompts of one job, always the same ones, whatever was finished before and however many ranks share the
shards: what is drawn, and each number to its last digit, depends on the shard alone. Only one model is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict, TypeVar

import torch

from model.network.checkpoint import open_checkpoint, read_config, read_tokenizer
from model.network.ranks import from_all_ranks, join_ranks
from model.network.transformer import Llama
from model.progress.bar import progress_bar
from model.sampling.sampler import Response, Sampling, sample
from model.scoring.answers import Asked, check_same_tokenizer, log_probabilities, score_answers
from model.scoring.reward import RewardModel, open_reward
from model.text.dialogue import decode_answer, encode_answer, encode_prompt
from model.text.tokenizer import Tokenizer
from tasks.reading.prompts import Kind, Prompt
from tasks.running.digests import number_of
from tasks.running.files import read_json, write_json

Model = TypeVar("Model")


class Settings(NamedTuple):
    """How everything is drawn and scored."""

    policy: Path
    rewards: Mapping[Kind, Path]
    round_name: str
    seed: int
    top_p: float
    top_k: int
    max_new_tokens: int
    precision: Literal["fp32", "bf16"]
    max_rows: int
    tokens_at_once: int
    save_every: int  # prompts of one shard
    scratch: Path


class Job(NamedTuple):
    """Prompts of one kind that are answered at one temperature; `name` is that of its folder in the scratch.

    Answers are scored as answers to the prompts that they were drawn from, or to those of `scored`, in the same order.
    """

    name: str
    kind: Kind
    temperature: float
    num_samples: int
    prompts: Sequence[Prompt]
    scored: Sequence[Prompt] | None = None


class Earlier(NamedTuple):
    """The best answer to a prompt of all earlier rounds, and the round that drew it."""

    text: str
    round: str


class Drawn(TypedDict):
    """An answer, and how many of the samples were this one; 0: it is the best of the earlier rounds."""

    text: str
    finished: bool
    num_tokens: int
    log_probability: float  # of the whole answer under the policy, nats
    round: str
    draws: int


class Candidate(Drawn):
    """An answer with both models' raw scores."""

    helpfulness: float
    safety: float


class Shard(NamedTuple):
    """Some prompts of a job, and those that their answers are scored with."""

    job: Job
    number: int
    prompts: Sequence[Prompt]
    scored: Sequence[Prompt]


def draw_and_score(
    settings: Settings, jobs: Sequence[Job], earlier: Mapping[str, Earlier], description: str | None
) -> dict[str, list[list[Candidate]]]:
    """Return the candidates of each prompt of each job, by the job's name, on every rank; the ranks share the shards.

    Equal answers are one candidate; the best of earlier rounds is the first. Raises ValueError for a score that is not
    finite, and as `check_models` does.
    """
    shards = [shard for job in jobs for shard in _shards_of(job, settings.save_every)]

    def open_policy() -> tuple[Llama, Tokenizer]:
        return open_checkpoint(settings.policy, settings.precision, join_ranks())

    def draw(models: tuple[Llama, Tokenizer], number: int) -> list[list[Drawn]]:
        return _drawn(settings, shards[number], earlier, *models)

    drawn: list[list[list[Drawn]]] = _worked_off(settings.scratch / "samples", shards, open_policy, draw, description)
    scores: dict[Kind, list[list[list[float]]]] = {}
    for kind, directory in settings.rewards.items():

        def open_model(directory: Path = directory) -> tuple[RewardModel, Tokenizer]:
            return open_reward(directory, settings.precision, join_ranks())

        def score(models: tuple[RewardModel, Tokenizer], number: int) -> list[list[float]]:
            model, tokenizer = models
            asked = [_asked(*each, tokenizer) for each in zip(shards[number].scored, drawn[number], strict=True)]
            return score_answers(model, asked, settings.tokens_at_once)

        scores[kind] = _worked_off(settings.scratch / kind, shards, open_model, score, description)
        for shard, found in zip(shards, scores[kind], strict=True):
            check_finite(shard.scored, found, directory)
    together: dict[str, list[list[Candidate]]] = {job.name: [] for job in jobs}
    for number, shard in enumerate(shards):
        raw = zip(drawn[number], scores["helpfulness"][number], scores["safety"][number], strict=True)
        for own, helpful, safe in raw:
            together[shard.job.name].append(
                [{**each, "helpfulness": h, "safety": s} for each, h, s in zip(own, helpful, safe, strict=True)]
            )
    return together


def check_models(settings: Settings) -> tuple[Tokenizer, int]:
    """Return the policy's tokenizer, and the context of all models, tokens.

    Raises ValueError for a reward model of another tokenizer, and as `model.network.checkpoint` does.
    """
    config = read_config(settings.policy)
    tokenizer, context = read_tokenizer(settings.policy, config), config.max_position_embeddings
    for directory in settings.rewards.values():
        config = read_config(directory)
        check_same_tokenizer(Tokenizer(directory / "tokenizer.model"), tokenizer)
        context = min(context, config.max_position_embeddings)
    return tokenizer, context


def check_finite(prompts: Sequence[Prompt], scores: Sequence[Sequence[float]], model: Path) -> None:
    """Raise ValueError for a score that is not finite."""
    for prompt, found in zip(prompts, scores, strict=True):
        for score in found:
            if not math.isfinite(score):
                raise ValueError(f"{model} scores an answer to prompt {prompt.id} {score}: the reward model is broken")


def _shards_of(job: Job, size: int) -> list[Shard]:
    """Divide a job's prompts."""
    scored = job.prompts if job.scored is None else job.scored
    assert len(scored) == len(job.prompts)
    return [
        Shard(job, number, job.prompts[begin : begin + size], scored[begin : begin + size])
        for number, begin in enumerate(range(0, len(job.prompts), size))
    ]


def _worked_off(
    folder: Path,
    shards: Sequence[Shard],
    open_models: Callable[[], Model],
    work: Callable[[Model, int], Any],
    description: str | None,
) -> list[Any]:
    """Return what `work` finds in each shard, on every rank; what a file holds already is not worked on again.

    The models are opened, by all ranks together, if any rank has work to do.
    """
    if not shards:
        return []
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    paths = [folder / f"{shard.job.name}-{shard.number}.json" for shard in shards]
    own = range(rank, len(shards), world)
    missing = [number for number in own if not paths[number].exists()]
    if any(from_all_ranks({rank: bool(missing)})):
        models = open_models()
        with progress_bar(len(missing), description and f"{description}: {folder.name}", "shard") as bar:
            for number in missing:
                write_json(paths[number], work(models, number))
                bar.update()
    return from_all_ranks({number: read_json(paths[number]) for number in own})


def _drawn(
    settings: Settings,
    shard: Shard,
    earlier: Mapping[str, Earlier],
    model: Llama,
    tokenizer: Tokenizer,
) -> list[list[Drawn]]:
    """Draw the answers to a shard's prompts."""
    job = shard.job
    about = f"{settings.seed} rejection {settings.round_name}"
    responses = sample(
        model,
        [encode_prompt(prompt.messages, tokenizer) for prompt in shard.prompts],
        Sampling(
            temperature=job.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_new_tokens=settings.max_new_tokens,
        ),
        num_samples=job.num_samples,
        eos_id=tokenizer.eos_id,
        seeds=[number_of(f"{about} {prompt.id} {job.temperature}") for prompt in shard.prompts],
        max_rows=settings.max_rows,
        description=None,
    )
    found = [distinct(own, tokenizer, settings.round_name) for own in responses]
    before = [number for number, prompt in enumerate(shard.prompts) if prompt.id in earlier]
    best = [earlier[shard.prompts[number].id] for number in before]
    asked = [
        _asked(shard.prompts[number], [{"text": each.text}], tokenizer)
        for number, each in zip(before, best, strict=True)
    ]
    again_read = log_probabilities(model, asked, settings.tokens_at_once)
    for number, each, ids, (log_probability,) in zip(before, best, asked, again_read, strict=True):
        again = [drawn for drawn in found[number] if drawn["finished"] and drawn["text"] == each.text]
        first = Drawn(
            text=each.text,
            finished=True,
            num_tokens=len(ids.answers[0]),
            log_probability=log_probability,
            round=each.round,
            draws=sum(drawn["draws"] for drawn in again),
        )
        found[number] = [first, *(drawn for drawn in found[number] if drawn not in again)]
    return found


def distinct(responses: Sequence[Response], tokenizer: Tokenizer, round_name: str) -> list[Drawn]:
    """Return a prompt's answers without duplicates, of which the first stays; a cut answer equals no finished one."""
    found: dict[tuple[str, bool], Drawn] = {}
    for response in responses:
        key = decode_answer(response.ids, tokenizer), response.finished
        if key not in found:
            found[key] = Drawn(
                text=key[0],
                finished=response.finished,
                num_tokens=len(response.ids),
                log_probability=sum(response.log_probabilities),
                round=round_name,
                draws=0,
            )
        found[key]["draws"] += 1
    return list(found.values())


def _asked(prompt: Prompt, answers: Sequence[Mapping[str, Any]], tokenizer: Tokenizer) -> Asked:
    """Return the ids of a prompt and its answers as reward models have learnt them: of the text, always with EOS."""
    return Asked(
        encode_prompt(prompt.messages, tokenizer),
        [encode_answer(prompt.messages, answer["text"], tokenizer) for answer in answers],
    )
