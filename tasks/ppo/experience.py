"""One iteration's experience: responses sampled from the policy, their scores, and what is known of their tokens.

Every rank ends up with all of it, so that whatever is computed over the batch is the same on any number of ranks; only
sampling, scoring and the models' passes are shared out. Passes go over the same packed micro batches as the updates do:
before the first update the ratio of new to sampled probabilities is then exactly 1, in any precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from model.network.ranks import from_all_ranks
from model.network.transformer import Llama
from model.rlhf.advantages import (
    clamped_log_odds,
    estimate_advantages,
    explained_variance,
    token_rewards,
    whiten_groups,
    whiten_tokens,
)
from model.rlhf.losses import kl_k1, kl_k3
from model.rlhf.rollouts import (
    Known,
    Rollout,
    RolloutBatch,
    batch_of_rollouts,
    padded,
    responses_of,
    token_log_probabilities,
    token_values,
)
from model.sampling.sampler import Sampling, sample
from model.scoring.answers import Asked, score_answers
from model.scoring.reward import RewardModel
from model.text.dialogue import decode_answer, encode_prompt
from model.text.tokenizer import Tokenizer
from model.training.engine import evaluating, gathered
from tasks.judging.ranking import Reward, Scales, reward_of
from tasks.reading.prompts import Kind, Prompt
from tasks.reading.shares import Asked as AskedPrompt
from tasks.running.digests import number_of

Batches = Sequence[Sequence[Sequence[int]]]  # rollouts, as indices, of each micro batch of each step


class Models(NamedTuple):
    """What is not trained: the tokenizer of all models, the starting policy, the reward models and their scales."""

    tokenizer: Tokenizer
    reference: Llama
    rewards: Mapping[Kind, RewardModel]
    directories: Mapping[Kind, Path]
    scales: Scales


class Answer(NamedTuple):
    """A response to a prompt, with both reward models' raw scores and the reward that they combine to."""

    kind: Kind
    prompt: Prompt
    rollout: Rollout
    finished: bool
    log_probability: float  # of all of it, by the sampler, nats
    helpfulness: float
    safety: float
    reward: Reward

    def text(self, tokenizer: Tokenizer) -> str:
        """Return the response as text."""
        return decode_answer(self.rollout.response, tokenizer)


class Drawing(NamedTuple):
    """How responses are drawn and scored."""

    max_new_tokens: int
    max_rows: int
    tokens_at_once: int
    max_log_odds: float


def draw(engine: Any, models: Models, asked: Sequence[AskedPrompt], about: str, drawing: Drawing) -> list[Answer]:
    """Sample one response to each prompt at temperature 1 from all tokens, and score it; the ranks share the prompts.

    `about` enters the seeds, beside the prompt and its place. A response that was cut is scored as if it had ended, as
    reward models know no other answers. Raises ValueError for a score that is not finite.
    """
    tokenizer = models.tokenizer
    prompts = [encode_prompt(each.prompt.messages, tokenizer) for each in asked]
    own = range(torch.distributed.get_rank(), len(asked), torch.distributed.get_world_size())
    with gathered(engine) as policy:
        responses = sample(
            policy,
            [prompts[number] for number in own],
            Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=drawing.max_new_tokens),
            num_samples=1,
            eos_id=tokenizer.eos_id,
            seeds=[number_of(f"{about} {number} {asked[number].prompt.id}") for number in own],
            max_rows=drawing.max_rows,
            description=None,
        )
    read = [
        Asked(prompts[number], [response.ids if response.finished else [*response.ids, tokenizer.eos_id]])
        for number, (response,) in zip(own, responses, strict=True)
    ]
    scores: dict[Kind, list[float]] = {}
    for kind, model in models.rewards.items():
        scores[kind] = [score for (score,) in score_answers(model, read, drawing.tokens_at_once)]
        for number, score in zip(own, scores[kind], strict=True):
            if not math.isfinite(score):
                raise ValueError(
                    f"{models.directories[kind]} scores an answer to prompt {asked[number].prompt.id} {score}: the "
                    "reward model is broken"
                )
    found = {
        number: (response.ids, response.finished, sum(response.log_probabilities), helpful, safe)
        for number, (response,), helpful, safe in zip(
            own, responses, scores["helpfulness"], scores["safety"], strict=True
        )
    }
    answers = []
    for each, prompt, (ids, finished, log_probability, helpful, safe) in zip(
        asked, prompts, from_all_ranks(found), strict=True
    ):
        reward = reward_of(each.kind, helpful, safe, 0.0, models.scales, 0.0)
        clamped = reward._replace(value=clamped_log_odds(reward.value, drawing.max_log_odds))
        rollout = Rollout(prompt, ids)
        answers.append(Answer(each.kind, each.prompt, rollout, finished, log_probability, helpful, safe, clamped))
    return answers


def plan_batches(
    rollouts: Sequence[Rollout], batch_rows: int, micro_batch_rows: int, draw: tuple[int, ...]
) -> list[list[list[int]]]:
    """Return which rollouts each step learns from, in micro batches: in a random order, of a step the shortest first.

    `draw` seeds the order. The rollouts divide into steps, and steps into micro batches.
    """
    assert len(rollouts) % batch_rows == 0 and batch_rows % micro_batch_rows == 0
    order = np.random.default_rng(draw).permutation(len(rollouts)).tolist()
    steps = []
    for first in range(0, len(order), batch_rows):
        rows = sorted(order[first : first + batch_rows], key=lambda number: len(rollouts[number].ids))
        steps.append([rows[begin : begin + micro_batch_rows] for begin in range(0, batch_rows, micro_batch_rows)])
    return steps


def own_micro_batches(micro_batches: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
    """Return this rank's equal share of a step's micro batches."""
    num_micro = len(micro_batches) // torch.distributed.get_world_size()
    first = torch.distributed.get_rank() * num_micro
    return micro_batches[first : first + num_micro]


class Measured(NamedTuple):
    """What three models say of a batch's tokens, and where there are tokens; all (B, L)."""

    sampled: Tensor  # log-probabilities under the policy before the updates
    reference: Tensor  # under the starting policy
    values: Tensor  # what the value model expects before each token
    is_token: Tensor

    @property
    def log_ratios(self) -> Tensor:
        """The logarithms of the policy's probabilities over the reference's."""
        return kl_k1(self.sampled, self.reference)


def measure(policy: Any, value: Any, reference: Llama, rollouts: Sequence[Rollout], steps: Batches) -> Measured:
    """Let the policy, the reference and the value model read all responses; the ranks share the micro batches."""
    micro_batches = [numbers for step in steps for numbers in own_micro_batches(step)]
    packed = [batch_of_rollouts([rollouts[n] for n in numbers], None, policy.device) for numbers in micro_batches]

    def read(model: Any, measured: Callable[[Any, RolloutBatch], Tensor]) -> list[list[float]]:
        found: dict[int, list[float]] = {}
        for numbers, batch in zip(micro_batches, packed, strict=True):
            rows = responses_of(measured(model, batch), batch, [rollouts[n] for n in numbers])
            found |= dict(zip(numbers, rows, strict=True))
        return from_all_ranks(found)

    with evaluating(policy):
        sampled = read(policy, token_log_probabilities)
    with evaluating(value):
        values = read(value, token_values)
    with torch.no_grad():
        started = read(reference, token_log_probabilities)
    is_token = padded([[1.0] * len(row) for row in sampled]) > 0
    return Measured(padded(sampled), padded(started), padded(values), is_token)


class Weighing(NamedTuple):
    """How rewards become advantages."""

    whitening: Literal["branch", "batch"]
    kl_coefficient: float
    missing_eos_penalty: float
    discount: float
    decay: float


def weigh(answers: Sequence[Answer], measured: Measured, weighing: Weighing) -> tuple[list[Known], float]:
    """Return what the tokens of each response are learnt with, and the variance that the value model explained.

    The rewards' log-odds are whitened over the batch (Llama 2, section 3.2.3) or over each model's responses in it,
    then a response without its end loses the penalty. Returns come from the advantages before these are whitened.
    """
    is_token_BL = measured.is_token
    cut_B = torch.tensor([not answer.finished for answer in answers])
    by_branch = weighing.whitening == "branch"
    groups_B = torch.tensor([by_branch and answer.reward.branch == "safety" for answer in answers])
    scores_B = whiten_groups(torch.tensor([answer.reward.value for answer in answers], dtype=torch.float32), groups_B)
    scores_B = scores_B - weighing.missing_eos_penalty * cut_B
    rewards_BL = token_rewards(scores_B, measured.log_ratios, is_token_BL, weighing.kl_coefficient)
    advantages_BL = estimate_advantages(rewards_BL, measured.values, is_token_BL, weighing.discount, weighing.decay)
    returns_BL = advantages_BL + measured.values
    explained = explained_variance(returns_BL[is_token_BL], measured.values[is_token_BL])
    rows = (measured.sampled, measured.values, whiten_tokens(advantages_BL, is_token_BL), returns_BL)
    known = [
        Known(*(row[number, : len(answer.rollout.response)] for row in rows)) for number, answer in enumerate(answers)
    ]
    return known, explained


def figures_of(answers: Sequence[Answer], measured: Measured) -> dict[str, float]:
    """Return what is to be watched of an iteration's samples; KL in nats per response, entropy per token.

    The entropy is estimated from the sampled tokens: the mean of their negative log-probabilities.
    """
    is_token_BL = measured.is_token
    k3_BL = kl_k3(measured.sampled, measured.reference) * is_token_BL
    lengths = [len(answer.rollout.response) for answer in answers]
    figures = {
        "reward": float(np.mean([answer.reward.value for answer in answers])),
        "kl": float((measured.log_ratios * is_token_BL).sum(dim=1).mean()),
        "kl_k3": float(k3_BL.sum(dim=1).mean()),
        "entropy": -float(measured.sampled[is_token_BL].mean()),
        "length": float(np.mean(lengths)),
        "finished": float(np.mean([answer.finished for answer in answers])),
        "empty": float(
            np.mean([answer.finished and length == 1 for answer, length in zip(answers, lengths, strict=True)])
        ),
        "safety_branch": float(np.mean([answer.reward.branch == "safety" for answer in answers])),
        "helpfulness/score": float(np.mean([answer.helpfulness for answer in answers])),
        "safety/score": float(np.mean([answer.safety for answer in answers])),
    }
    for branch in ("helpfulness", "safety"):
        own = [answer.reward.value for answer in answers if answer.reward.branch == branch]
        figures[f"{branch}/reward"] = float(np.mean(own)) if own else 0.0
    return figures
