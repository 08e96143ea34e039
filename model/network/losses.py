"""The loss of each token.

Shapes: T tokens of a packed batch, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from model.network.packing import IGNORED

CHUNK = 1024  # tokens with float32 logits at once: these stay in the processor's cache, about twice as fast


def token_losses(hidden_TD: Tensor, head: Callable[[Tensor], Tensor], targets_T: Tensor) -> Tensor:
    """Return each token's cross entropy in nats, float32: 0 where the target is IGNORED.

    `head` maps hidden states to logits, of those tokens that have a target: in a dialogue, few have. There is no mean
    here: batches, micro batches and ranks hold different numbers of targets, and only the sum over all of them, divided
    by their number, is the loss.
    """
    is_target_T = targets_T != IGNORED
    chunks = zip(torch.split(hidden_TD[is_target_T], CHUNK), torch.split(targets_T[is_target_T], CHUNK), strict=True)
    losses = [
        nn.functional.cross_entropy(head(hidden_CD).float(), targets_C, reduction="none")
        for hidden_CD, targets_C in chunks
    ]
    return torch.zeros(len(targets_T), device=hidden_TD.device).masked_scatter(is_target_T, torch.cat(losses))
