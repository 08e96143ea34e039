"""A reward model: a Llama 2 whose language-model head is replaced by a scalar (Llama 2, section 3.2.2).

The score of a dialogue's last answer is read at the dialogue's last token, its EOS. Weights carry the names of Hugging
Face's LlamaForSequenceClassification. Dialogues are packed, not padded, so a score doesn't depend on its company.

Shapes: T tokens of a packed batch, D hidden size, B documents (dialogues), P pairs of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from model.engine import fill_weights
from model.losses import ranking_losses
from model.packing import Documents, documents_of
from model.transformer import Checkpointing, Decoder, ModelConfig, first_weights


class Head(nn.Module):
    """One number from a hidden state, in float32: in bfloat16 near scores would be equal."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, size))

    def forward(self, hidden_BD: Tensor) -> Tensor:
        """Return a number for each (B,), float32."""
        return nn.functional.linear(hidden_BD.float(), self.weight.float())[:, 0]


class RewardModel(nn.Module):
    """A decoder with a head that scores, and one that tells safe answers where that is learnt, too."""

    def __init__(self, config: ModelConfig, checkpointing: Checkpointing, tells_safety: bool = False) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config, checkpointing)
        self.score = Head(config.hidden_size)
        self.safety = Head(config.hidden_size) if tells_safety else None

    def forward(self, ids_T: Tensor, documents: Documents, with_safety: bool = False) -> Tensor:
        """Return each document's score (B,), float32; with safety (2, B): scores, and the logits that it is safe."""
        hidden_BD = self.model(ids_T, documents)[documents.boundaries[1:] - 1]
        scores_B: Tensor = self.score(hidden_BD)
        if not with_safety:
            return scores_B
        assert self.safety is not None, "the model was built without a head for safety"
        return torch.stack((scores_B, self.safety(hidden_BD)))


def draw_heads(model: RewardModel, seed: int) -> None:
    """Give a reward model's heads their first weights, the same on any number of ranks."""
    generator = torch.Generator().manual_seed(seed)
    for head in (model.score, model.safety):
        if head is not None:
            fill_weights(head, lambda name, shape: first_weights(name, shape, model.config, generator))


# --- learning from pairs ---


class Pair(NamedTuple):
    """Two answers to the same, as the ids of their dialogues; whether each is safe, None where that is not known."""

    chosen: Sequence[int]
    rejected: Sequence[int]
    margin: float
    chosen_safe: bool | None
    rejected_safe: bool | None


@dataclass(frozen=True)
class PairBatch:
    """Pairs, packed: both answers of each, the shortest dialogues first."""

    ids: Tensor  # (T,)
    documents: Documents
    places: Tensor  # (2, P) int64: which document is each pair's chosen and which its rejected answer
    margins: Tensor  # (P,)
    safe: Tensor  # (2, P): 1 where the answer is known to be safe
    known: Tensor  # (2, P): 1 where it is known whether it is
    weight: float  # 0: not learnt from; only keeps a rank in step with the others


def batch_of_pairs(pairs: Sequence[Pair], device: torch.device, weight: float = 1.0) -> PairBatch:
    """Return pairs as one packed batch."""
    dialogues = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    order = sorted(range(len(dialogues)), key=lambda number: len(dialogues[number]))
    places = np.empty(len(order), dtype=np.int64)
    places[order] = np.arange(len(order))
    labels = [[pair.chosen_safe for pair in pairs], [pair.rejected_safe for pair in pairs]]
    return PairBatch(
        *packed([dialogues[number] for number in order], device),
        places=torch.from_numpy(places.reshape(2, -1)).to(device),
        margins=torch.tensor([pair.margin for pair in pairs], dtype=torch.float32, device=device),
        safe=torch.tensor([[label is True for label in row] for row in labels], device=device).float(),
        known=torch.tensor([[label is not None for label in row] for row in labels], device=device).float(),
        weight=weight,
    )


def packed(dialogues: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Documents]:
    """Return dialogues one after another (T,), and where each lies."""
    ids = np.concatenate([np.asarray(dialogue, dtype=np.int64) for dialogue in dialogues])
    return torch.from_numpy(ids).to(device), documents_of([len(dialogue) for dialogue in dialogues], device)


def pair_losses(engine: Any, batch: PairBatch, safety_loss_weight: float) -> tuple[Tensor, Tensor]:
    """Return each pair's loss (P,) in nats, and by how much its chosen answer's score leads (P,).

    The loss is the ranking's (Llama 2, equation 2). A weight above 0 adds as much of the auxiliary safety loss (section
    3.2.2): the binary cross entropy that an answer is safe, the mean over those of the pair's two that have a label.
    """
    if safety_loss_weight:
        (chosen_P, rejected_P), logits_2P = engine(batch.ids, batch.documents, True)[:, batch.places]
        safety_2P = nn.functional.binary_cross_entropy_with_logits(logits_2P, batch.safe, reduction="none")
        auxiliary_P = (safety_2P * batch.known).sum(dim=0) / batch.known.sum(dim=0).clamp(min=1.0)
    else:
        chosen_P, rejected_P = engine(batch.ids, batch.documents)[batch.places]
        auxiliary_P = torch.zeros_like(batch.margins)
    losses_P = ranking_losses(chosen_P, rejected_P, batch.margins) + safety_loss_weight * auxiliary_P
    return batch.weight * losses_P, chosen_P - rejected_P


# --- scoring ---


def plan_batches(dialogues: Sequence[Sequence[int]], tokens_at_once: int) -> list[list[int]]:
    """Return the dialogues of each batch, as numbers: shortest first, in all no more tokens than told, or one alone."""
    batches: list[list[int]] = []
    room = 0
    for number in sorted(range(len(dialogues)), key=lambda number: len(dialogues[number])):
        if len(dialogues[number]) > room:
            batches.append([])
            room = tokens_at_once
        batches[-1].append(number)
        room -= len(dialogues[number])
    return batches


def score(model: RewardModel, dialogues: Sequence[Sequence[int]], tokens_at_once: int) -> list[float]:
    """Return the score of each dialogue, given the ids of it up to and with its last answer's EOS.

    `tokens_at_once` bounds what is in memory, and changes no score.
    """
    scores, device = [0.0] * len(dialogues), model.score.weight.device
    with torch.no_grad():
        for batch in plan_batches(dialogues, tokens_at_once):
            found = model(*packed([dialogues[number] for number in batch], device)).tolist()
            for number, value in zip(batch, found, strict=True):
                scores[number] = value
    return scores
