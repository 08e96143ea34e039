"""Losses: of tokens, and of preferences.

Shapes: T tokens of a packed batch, D hidden size, V vocabulary, B pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from model.packing import IGNORED

CHUNK = 1024  # tokens whose logits are in float32 at once: they stay in the processor's cache, about twice as fast

Margins = Literal["none", "small", "large"]
# By how much the chosen answer's score has to lead, by the degree of the preference (Llama 2, table 27); a degree that
# was not given has no margin.
MARGINS: Mapping[Margins, Mapping[str | None, float]] = {
    "none": {"significantly": 0.0, "better": 0.0, "slightly": 0.0, "negligibly": 0.0, None: 0.0},
    "small": {"significantly": 1.0, "better": 2 / 3, "slightly": 1 / 3, "negligibly": 0.0, None: 0.0},
    "large": {"significantly": 3.0, "better": 2.0, "slightly": 1.0, "negligibly": 0.0, None: 0.0},
}


def token_losses(hidden_TD: Tensor, head: Callable[[Tensor], Tensor], targets_T: Tensor) -> Tensor:
    """Return each token's cross entropy in nats, float32: 0 where the target is IGNORED.

    `head` maps hidden states to logits. Sums, not means, leave here: batches, micro batches and ranks hold unequal
    numbers of targets, and only the sum over all of them, divided by their number, is the loss.
    """
    losses = [
        nn.functional.cross_entropy(head(hidden_CD).float(), targets_C, ignore_index=IGNORED, reduction="none")
        for hidden_CD, targets_C in zip(torch.split(hidden_TD, CHUNK), torch.split(targets_T, CHUNK), strict=True)
    ]
    return torch.cat(losses)


def ranking_losses(chosen_B: Tensor, rejected_B: Tensor, margins_B: Tensor) -> Tensor:
    """Return each pair's loss in nats, given the scores of its two answers (Llama 2, equation 2; 1 without margins)."""
    return -nn.functional.logsigmoid(chosen_B - rejected_B - margins_B)
