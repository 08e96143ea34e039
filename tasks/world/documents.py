"""Documents and their similarity: what a source holds, and how to keep any two apart unless a copy is planted."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tasks.world.wording import words_of

Shingles = frozenset[tuple[str, ...]]
ATTEMPTS = 100  # draws of one document before its wordings count as used up


@dataclass
class Document:
    """One document of a source. `labels`: what is planted in it; `malformed`: a line that is not JSON."""

    text: str
    labels: list[dict[str, Any]] = field(default_factory=list)
    malformed: bool = False


def shingles(text: str) -> Shingles:
    """Return the set of runs of three consecutive words, in lower case and without punctuation."""
    words = words_of(text)
    return frozenset(zip(words, words[1:], words[2:], strict=False)) or frozenset([tuple(words)])


def similarity(first: Shingles, second: Shingles) -> float:
    """Return the Jaccard similarity of two sets of shingles, 0 to 1."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def distinct(make: Callable[[], str], bucket: list[Shingles], similarity_max: float, what: str) -> Document:
    """Return a document that is less similar than `similarity_max` to all in its bucket, and add it there.

    Raises ValueError, naming the parameter, when the wordings give no further one.
    """
    for _ in range(ATTEMPTS):
        text = make()
        own = shingles(text)
        if all(similarity(own, other) < similarity_max for other in bucket):
            bucket.append(own)
            return Document(text)
    raise ValueError(
        f"params.yaml: `world.{what}` asks for more documents than the wordings in data/seeds/world give "
        f"(after {len(bucket)} about one subject, every further one resembles another): lower it, or add wordings"
    )


def pristine(documents: Iterable[Document]) -> list[Document]:
    """Return the documents in which nothing is planted yet."""
    return [document for document in documents if not document.labels and not document.malformed]
