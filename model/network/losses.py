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

    `head` maps hidden states to logits. There is no mean here: batches, micro batches and ranks hold different numbers
    of targets, and only the sum over all of them, divided by their number, is the loss.
    """
    losses = [
        nn.functional.cross_entropy(head(hidden_CD).float(), targets_C, ignore_index=IGNORED, reduction="none")
        for hidden_CD, targets_C in zip(torch.split(hidden_TD, CHUNK), torch.split(targets_T, CHUNK), strict=True)
    ]
    return torch.cat(losses)
