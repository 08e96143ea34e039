"""Pack a token stream or examples into batches: documents in a row in flat tensors, none attending to another.

Shapes: T tokens of a batch, B blocks of L tokens each.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BLOCK = 256  # tokens; the scores of longer documents don't fit into the processor's cache
IGNORED = -100  # target of a position that predicts nothing; cross_entropy's own mark

Tokens = npt.NDArray[Any]  # unsigned integers, often memory-mapped
Starts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Documents:
    """The layout of a packed batch's documents; attention stays within a document, whose positions count from 0."""

    lengths: tuple[int, ...]
    positions: Tensor  # (T,) of each token in its document
    boundaries: Tensor  # int32: first token of each document, and the end of the last

    @property
    def longest(self) -> int:
        """Number of tokens of the longest document."""
        return max(self.lengths)

    @property
    def runs(self) -> list[tuple[int, int, Tensor | None]]:
        """Neighbouring documents of the same length: their length, their number, and None, as they need no mask."""
        return [(length, len(list(alike)), None) for length, alike in groupby(self.lengths)]

    @cached_property
    def blocks(self) -> list[tuple[int, int, Tensor | None]]:
        """Runs as above, but of blocks: neighbouring documents joined while they fit into BLOCK tokens.

        The mask (B, 1, L, L) is added to scores: 0 where a token sees another, minus infinity elsewhere. A document
        longer than BLOCK stays alone and has no mask.
        """
        runs: list[tuple[int, int, Tensor | None]] = []
        begin = 0
        for length, alike in groupby(_joined(self.lengths)):
            count = len(list(alike))
            positions_BL = self.positions[begin : begin + length * count].view(count, length)
            begin += length * count
            if length > BLOCK:
                runs.append((length, count, None))
                continue
            # a token sees the places from its document's first up to its own
            places_L = torch.arange(length, device=positions_BL.device)
            ago_LL = places_L[:, None] - places_L
            seen_BLL = (ago_LL >= 0) & (ago_LL <= positions_BL[:, :, None])
            mask_BLL = torch.full(seen_BLL.shape, -math.inf, dtype=torch.bfloat16, device=positions_BL.device)
            runs.append((length, count, mask_BLL.masked_fill_(seen_BLL, 0.0)[:, None]))
        return runs


def _joined(lengths: Sequence[int]) -> Iterator[int]:
    """Join neighbours while their sum stays within BLOCK; yield the sums."""
    together = 0
    for length in lengths:
        if together and together + length > BLOCK:
            yield together
            together = 0
        together += length
    yield together


@dataclass(frozen=True)
class Batch:
    """Tokens, and the token that each must predict (IGNORED: none)."""

    ids: Tensor  # (T,)
    targets: Tensor  # (T,)
    documents: Documents

    @property
    def num_targets(self) -> int:
        """Number of tokens that are predicted in this batch."""
        return int((self.targets != IGNORED).sum())


def documents_of(lengths: Sequence[int], device: torch.device) -> Documents:
    """Return the layout of documents with these lengths, one after another."""
    lengths_D = np.asarray(lengths, dtype=np.int64)
    boundaries = np.concatenate(([0], np.cumsum(lengths_D)))
    positions_T = np.arange(boundaries[-1]) - np.repeat(boundaries[:-1], lengths_D)
    return Documents(
        lengths=tuple(int(length) for length in lengths),
        positions=torch.from_numpy(positions_T).to(device),
        boundaries=torch.from_numpy(boundaries.astype(np.int32)).to(device),
    )


class Shards:
    """A stream of tokens in several arrays, usually memory-mapped files; only what is read is held in memory."""

    def __init__(self, parts: Sequence[Tokens]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, begin: int, end: int) -> Tokens:
        """Return tokens `begin` to `end`."""
        first, last = np.searchsorted(self.ends, (begin, end - 1), side="right")
        offsets = self.ends[first : last + 1] - [len(part) for part in self.parts[first : last + 1]]
        pieces = zip(self.parts[first : last + 1], offsets, strict=True)
        return np.concatenate([part[max(0, begin - offset) : end - offset] for part, offset in pieces])


def num_rows(stream: Shards, context: int) -> int:
    """Return how many full rows of `context` tokens a stream gives; a row's last token predicts the one after it."""
    return max(0, (len(stream) - 1) // context)


def num_targets(starts: Starts, begin: int, end: int) -> int:
    """Return how many of the tokens `begin` to `end` predict the next one: all but the last of each document."""
    return end - begin - int(np.diff(np.searchsorted(starts, (begin, end), side="right"))[0])


def batch_of_rows(
    stream: Shards, starts: Starts, first_row: int, rows: int, context: int, device: torch.device
) -> Batch:
    """Return rows `first_row` to `first_row + rows` of a stream, cut every `context` tokens, as one packed batch.

    `starts` holds the position of each document's first token in the stream, ascending. A document continued from the
    row before counts as a document of its own: it can't see that row. A token predicts the next one of its document,
    even across rows; nothing predicts a document's first token. Rows beyond the stream's end are empty; the last row
    may be short.
    """
    begin = first_row * context
    end = min((first_row + rows) * context, len(stream))
    ids = stream.read(begin, min(end + 1, len(stream))).astype(np.int64)
    length = end - begin
    inside = starts[np.searchsorted(starts, begin) : np.searchsorted(starts, end, side="right")] - begin
    targets = np.full(length, IGNORED, dtype=np.int64)
    targets[: len(ids) - 1] = ids[1:]
    targets[inside[inside > 0] - 1] = IGNORED
    cuts = np.unique(np.concatenate((inside[inside < length], np.arange(0, length, context), [length])))
    return Batch(
        ids=torch.from_numpy(ids[:length]).to(device),
        targets=torch.from_numpy(targets).to(device),
        documents=documents_of([int(n) for n in np.diff(cuts)], device),
    )


class Example(NamedTuple):
    """Tokens that stay together in one row, of which only some are learnt: in a dialogue, those of the answers."""

    ids: npt.NDArray[np.int32]
    is_learnt: npt.NDArray[np.bool_]

    @property
    def num_targets(self) -> int:
        """Number of tokens that are predicted; the first never is."""
        return int(self.is_learnt[1:].sum())


def fill_rows(lengths: Sequence[int], order: Sequence[int], context: int) -> list[list[int]]:
    """Return the examples of each row, as indices into `lengths`, so that no row holds more than `context` tokens.

    Examples are placed in the given `order`: each goes where it leaves the least room (best fit), or starts a new row.
    """
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # the room left in each row, and the row's number; ascending
    for number in order:
        length = lengths[number]
        assert 0 < length <= context, f"an example of {length} tokens does not fit into a row of {context}"
        place = bisect_left(rooms, (length, 0))
        if place == len(rooms):
            room, row = context, len(rooms)
            rows.append([])
        else:
            room, row = rooms.pop(place)
        rows[row].append(number)
        insort(rooms, (room - length, row))
    return rows


def batch_of_examples(examples: Sequence[Example], device: torch.device) -> Batch:
    """Return examples as one packed batch: a token predicts the next one of its example, if that one is learnt.

    The shortest come first: neighbours of the same length share one call of attention.
    Raises ValueError when no token is learnt, or every token: then the mask is wrong.
    """
    examples = sorted(examples, key=lambda example: len(example.ids))
    ids = np.concatenate([example.ids for example in examples]).astype(np.int64)
    targets = np.concatenate(
        [np.append(np.where(example.is_learnt, example.ids, IGNORED)[1:], IGNORED) for example in examples]
    ).astype(np.int64)
    num_learnt = sum(int(example.is_learnt.sum()) for example in examples)
    if num_learnt in (0, len(ids)):
        raise ValueError(
            f"{'each' if num_learnt else 'none'} of the {len(ids)} tokens of a batch is to be learnt: the examples' "
            "mask is wrong, because a dialogue has prompts, which are only read, and answers, which are learnt"
        )
    return Batch(
        ids=torch.from_numpy(ids).to(device),
        targets=torch.from_numpy(targets).to(device),
        documents=documents_of([len(example.ids) for example in examples], device),
    )
