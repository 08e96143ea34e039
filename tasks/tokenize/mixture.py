"""Plan a mixture of sources: how many tokens each gives, and whose document comes next (LLaMA section 2.1).

Plain arithmetic on weights and lengths, without files: the stage `tokenize` applies it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from itertools import count

import numpy as np

from tasks.running.digests import number_of


def plan_targets(weights: dict[str, float], capacities: dict[str, int], num_tokens: int) -> dict[str, float]:
    """Return how many tokens each source gives: its weight's part of `num_tokens`, but never above its capacity.

    What a source can't give comes from the others, in proportion to their weights.
    """
    targets: dict[str, float] = {}
    waiting = {name: weight for name, weight in sorted(weights.items()) if weight > 0}
    left = float(num_tokens)
    while waiting:
        unit = left / sum(waiting.values())
        full = [name for name, weight in waiting.items() if capacities[name] <= unit * weight]
        if not full:
            return targets | {name: unit * weight for name, weight in waiting.items()}
        for name in full:
            targets[name] = capacities[name]
            left -= capacities[name]
            del waiting[name]
    return targets


def draw(
    lengths: list[list[int]], targets: list[float], capacities: list[int], num_tokens: int, orders: list[Iterator[int]]
) -> Iterator[tuple[int, int]]:
    """Yield the stream's documents: the source's number, and the document's number in it. All lists are by source.

    Next comes the source whose next document has the earliest middle, as a fraction of the source's target. So at any
    point each source has given its part of the stream so far, to within about the length of one document. A source
    ends at its target, rounded to whole documents, and never above its capacity; the stream ends at `num_tokens`.
    """
    given = [0] * len(lengths)
    queue: list[tuple[float, int, int]] = []

    def enqueue(source: int) -> None:
        document = next(orders[source])
        length = lengths[source][document]
        middle = (given[source] + length / 2) / targets[source]
        if middle <= 1 and given[source] + length <= capacities[source]:
            heapq.heappush(queue, (middle, source, document))

    for source, target in enumerate(targets):
        if target > 0:
            enqueue(source)
    left = num_tokens
    while queue:
        _, source, document = heapq.heappop(queue)
        length = lengths[source][document]
        if length <= left:
            left -= length
            given[source] += length
            yield source, document
            enqueue(source)


def shuffled(num_documents: int, name: str, seed: int) -> Iterator[int]:
    """Yield positions 0 .. num_documents - 1 in a new random order every epoch, without end."""
    key = number_of(name, num_bytes=8)
    for epoch in count():
        yield from np.random.default_rng([seed, key, epoch]).permutation(num_documents).tolist()
