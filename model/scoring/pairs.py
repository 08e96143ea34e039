"""How a reward model learns from pairs of answers (Llama 2, section 3.2.2).

Shapes: P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from model.network.packing import Documents
from model.scoring.reward import packed

Margins = Literal["none", "small", "large"]
# By how much the chosen answer's score must lead, by the degree of the preference (Llama 2, table 27); without a degree
# the margin is 0.
MARGINS: Mapping[Margins, Mapping[str | None, float]] = {
    "none": {"significantly": 0.0, "better": 0.0, "slightly": 0.0, "negligibly": 0.0, None: 0.0},
    "small": {"significantly": 1.0, "better": 2 / 3, "slightly": 1 / 3, "negligibly": 0.0, None: 0.0},
    "large": {"significantly": 3.0, "better": 2.0, "slightly": 1.0, "negligibly": 0.0, None: 0.0},
}


class Pair(NamedTuple):
    """Two answers to the same prompt, as the ids of their dialogues; whether each is safe, None if not known."""

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
    places: Tensor  # (2, P) int64: which document holds each pair's chosen answer, and which its rejected one
    margins: Tensor  # (P,)
    safe: Tensor  # (2, P): 1 where the answer is known to be safe
    known: Tensor  # (2, P): 1 where it is known whether the answer is safe
    weight: float  # 0: not learnt from; the batch only keeps a rank in step with the others


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


def pair_losses(engine: Any, batch: PairBatch, safety_loss_weight: float) -> tuple[Tensor, Tensor]:
    """Return each pair's loss (P,) in nats, and by how much its chosen answer's score leads (P,).

    It is the ranking loss (Llama 2, equation 2) plus the weighted auxiliary safety loss (section 3.2.2): the binary
    cross entropy of whether an answer is safe, averaged over those of the pair's two answers that have a label.
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


def ranking_losses(chosen_P: Tensor, rejected_P: Tensor, margins_P: Tensor) -> Tensor:
    """Return each pair's loss in nats, given both answers' scores (Llama 2, equation 2, or 1 without margins)."""
    return -nn.functional.logsigmoid(chosen_P - rejected_P - margins_P)
