"""Sampled responses as what a policy and its value model learn from: packed, each token beside what is known of it.

Shapes: T tokens of a packed batch, B responses, L tokens of the longest response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.network.packing import IGNORED, Batch, Documents, documents_of
from model.rlhf.losses import policy_losses, value_losses


@dataclass(frozen=True)
class Rollout:
    """A prompt's ids, and those of a response that a policy sampled, EOS included if it was reached."""

    prompt: Sequence[int]
    response: Sequence[int]

    @property
    def ids(self) -> list[int]:
        """All ids, the prompt's first."""
        return [*self.prompt, *self.response]


@dataclass(frozen=True)
class RolloutBatch:
    """Rollouts, packed, in the order given. A response's token is predicted at the place before it."""

    ids: Tensor  # (T,)
    targets: Tensor  # (T,) the next token where it is of the response, else IGNORED
    documents: Documents
    known: Tensor  # (len(Known), T): see `Known`; 0 where the target is IGNORED

    @property
    def is_target(self) -> Tensor:
        """Where a token of a response is predicted (T,)."""
        return self.targets != IGNORED


@dataclass(frozen=True)
class Known:
    """What is known of the tokens of one response, each (its number of tokens,)."""

    log_probabilities: Tensor  # under the policy that sampled it
    values: Tensor  # what the value model expected before
    advantages: Tensor
    returns: Tensor


def batch_of_rollouts(rollouts: Sequence[Rollout], known: Sequence[Known] | None, device: torch.device) -> RolloutBatch:
    """Return rollouts as one packed batch; without what is known, to compute it."""
    ids = np.concatenate([np.asarray(rollout.ids, dtype=np.int64) for rollout in rollouts])
    lengths = [len(rollout.ids) for rollout in rollouts]
    targets = np.append(ids[1:], IGNORED)
    end = 0
    for rollout, length in zip(rollouts, lengths, strict=True):
        targets[end : end + len(rollout.prompt) - 1] = IGNORED
        end += length
        targets[end - 1] = IGNORED
    targets_T = torch.from_numpy(targets).to(device)
    known_4T = torch.zeros(4, len(ids), device=device)
    if known is not None:
        rows = [torch.stack((one.log_probabilities, one.values, one.advantages, one.returns)) for one in known]
        known_4T[:, targets_T != IGNORED] = torch.cat(rows, dim=1).to(device)
    return RolloutBatch(torch.from_numpy(ids).to(device), targets_T, documents_of(lengths, device), known_4T)


def responses_of(values_T: Tensor, batch: RolloutBatch, rollouts: Sequence[Rollout]) -> list[list[float]]:
    """Return a packed batch's values at the tokens of each response: those at the places that predict them."""
    values: list[float] = values_T[batch.is_target].tolist()
    found, begin = [], 0
    for rollout in rollouts:
        found.append(values[begin : begin + len(rollout.response)])
        begin += len(rollout.response)
    return found


def padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """Return rows of different lengths as one tensor (B, L), zeros after each row's end."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0.0] * (longest - len(row))] for row in rows])


def token_log_probabilities(model: Any, batch: RolloutBatch) -> Tensor:
    """Return the log-probability of each response token (T,), at the place that predicts it; elsewhere 0."""
    losses_T: Tensor = model(batch.ids, batch.documents, batch.targets)
    return -losses_T


def token_values(model: Any, batch: RolloutBatch) -> Tensor:
    """Return what a value model expects before each response token (T,), at the place that predicts it; elsewhere 0."""
    values_T: Tensor = model(batch.ids, batch.documents)
    return values_T * batch.is_target


def policy_loss(
    engine: Any, batch: RolloutBatch, clip: float, text: Batch | None = None, text_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the sum of the policy's losses over a batch's response tokens, and the tokens' log-probabilities (T,).

    With `text`, which the model was pretrained on, the weighted sum of its tokens' losses is added (Ouyang et al. 2022,
    equation 2); the same forward pass reads both.
    """
    sampled_T, _, advantages_T, _ = batch.known
    if text is None:
        log_probabilities_T = token_log_probabilities(engine, batch)
        added = torch.zeros((), device=batch.ids.device)
    else:
        ids, targets = torch.cat((batch.ids, text.ids)), torch.cat((batch.targets, text.targets))
        documents = documents_of([*batch.documents.lengths, *text.documents.lengths], batch.ids.device)
        losses: Tensor = engine(ids, documents, targets)
        log_probabilities_T = -losses[: len(batch.ids)]
        added = text_weight * losses[len(batch.ids) :].sum()
    losses_T = policy_losses(log_probabilities_T, sampled_T, advantages_T, clip)
    return losses_T.sum() + added, log_probabilities_T.detach()


def value_loss(engine: Any, batch: RolloutBatch, clip: float) -> Tensor:
    """Return the sum of the value model's losses over a batch's response tokens."""
    _, before_T, _, returns_T = batch.known
    return value_losses(token_values(engine, batch), before_T, returns_T, clip).sum()
