"""A checkpoint's perplexity on each source's held-out text (Llama 2, section 3.4, as a check of what tuning costs)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from model.network.ranks import from_all_ranks
from model.network.transformer import Llama
from model.scoring.text import losses_of
from model.text.tokenizer import Tokenizer
from tasks.judging.intervals import CONFIDENCE, RESAMPLES
from tasks.learning.stream import Text, read_stream
from tasks.running.names import metric_name


class Perplexity(NamedTuple):
    """A text's perplexity over its predicted tokens, with a 95% interval by document; one document has none."""

    documents: int
    tokens: int
    perplexity: float
    low: float | None
    high: float | None


def perplexities_of(
    model: Llama, tokenizer: Tokenizer, directory: Path, text_tokenizer: Path, max_tokens: int, tokens_at_once: int
) -> dict[str, Perplexity]:
    """Return the perplexity of each source's first held-out documents, and of all; the ranks share the documents.

    A document that is longer than the context is cut there. Raises ValueError as `read_stream` does, and when the text
    was encoded with another tokenizer than the model's.
    """
    _, validation = read_stream(directory)
    if Path(tokenizer.path).read_bytes() != text_tokenizer.read_bytes():
        raise ValueError(
            f"{tokenizer.path} is another tokenizer than {text_tokenizer}, which encoded {directory}: set "
            "`evaluate.text` and `evaluate.text_tokenizer` to the text that the checkpoint was trained on and its "
            "tokenizer, or both to data/seeds/none"
        )
    context = model.config.max_position_embeddings
    texts = {source: documents_of(text, max_tokens, context) for source, text in validation.items()}
    every = [(source, ids) for source, own in texts.items() for ids in own]
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = range(rank, len(every), world)
    found = losses_of(model, [every[number][1] for number in own], tokens_at_once)
    losses = from_all_ranks(dict(zip(own, found, strict=True)))
    pairs: dict[str, list[tuple[float, int]]] = {"all": []}
    for (source, ids), loss in zip(every, losses, strict=True):
        for name in ("all", metric_name(source)):
            pairs.setdefault(name, []).append((loss, len(ids) - 1))
    return {name: perplexity_of(values) for name, values in pairs.items() if values}


def documents_of(text: Text, max_tokens: int, context: int) -> list[list[int]]:
    """Return the first documents of a text, as ids, that together have at most so many tokens; at least one.

    Those of a single token are left out: nothing in them is predicted.
    """
    ends = [*text.starts[1:].tolist(), len(text.tokens)]
    documents: list[list[int]] = []
    room = max_tokens
    for start, end in zip(text.starts.tolist(), ends, strict=True):
        length = min(end - start, context)
        if length > room and documents:
            break
        if length > 1:
            documents.append(text.tokens.read(start, start + length).tolist())
            room -= length
    return documents


def perplexity_of(documents: Sequence[tuple[float, int]]) -> Perplexity:
    """Return the perplexity of documents, given summed loss and number of predicted tokens of each.

    The interval is the bootstrap's over documents, as the tokens of one depend on each other.
    """
    values_N2 = np.asarray(documents, dtype=float)
    total, count = values_N2.sum(axis=0)
    low = high = None
    if len(documents) > 1:
        drawn_RN = np.random.default_rng(0).integers(len(documents), size=(RESAMPLES, len(documents)))
        sums_R2 = values_N2[drawn_RN].sum(axis=1)
        ends = np.quantile(sums_R2[:, 0] / sums_R2[:, 1], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        low, high = (math.exp(end) for end in ends)
    return Perplexity(len(documents), int(count), math.exp(total / count), low, high)


def perplexity_figures(found: Mapping[str, Perplexity]) -> dict[str, float]:
    """Return perplexities as metrics."""
    figures: dict[str, float] = {}
    for name, each in found.items():
        place = f"perplexity/{name}"
        values = {place: each.perplexity, f"{place}/low": each.low, f"{place}/high": each.high}
        figures |= {key: value for key, value in values.items() if value is not None}
    return figures
