"""The losses of plain texts under a language model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.network.transformer import Llama
from model.scoring.reward import packed, plan_batches


def losses_of(model: Llama, texts: Sequence[Sequence[int]], tokens_at_once: int) -> list[float]:
    """Return each text's summed loss in nats, given its ids: of all tokens but the first, which nothing predicts.

    `tokens_at_once` limits memory, and changes no loss.
    """
    losses = [0.0] * len(texts)
    with torch.no_grad():
        for batch in plan_batches(texts, tokens_at_once):
            ids_T, documents = packed([texts[number] for number in batch], model.lm_head.weight.device)
            losses_T = model(ids_T, documents, ids_T.roll(-1)).double()
            ends = documents.boundaries.tolist()
            for number, begin, end in zip(batch, ends[:-1], ends[1:], strict=True):
                losses[number] = float(losses_T[begin : end - 1].sum())
    return losses
