"""Repetition rules (Rae et al. 2021, table A1): lines, paragraphs and n-grams that a document repeats.

Shapes: W words, N n-grams = W - n + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from tasks.clean.quality import Verdict
from tasks.running.params import Section

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MULTIPLIERS = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9  # odd, bits well mixed: those of SplitMix64


class Repetition(Section):
    """Rae et al. 2021, table A1, repetition. Shares are of lines, paragraphs, or characters of words."""

    max_line_share: float | None = Field(gt=0, le=1, description="lines that repeat an earlier one")
    max_line_character_share: float | None = Field(gt=0, le=1, description="characters in such lines")
    max_paragraph_share: float | None = Field(gt=0, le=1, description="paragraphs that repeat an earlier one")
    max_paragraph_character_share: float | None = Field(gt=0, le=1, description="characters in such paragraphs")
    max_top_ngram_shares: list[float] | None = Field(
        min_length=3, max_length=3, description="characters in the most frequent 2-, 3-, 4-gram"
    )
    max_repeated_ngram_shares: list[float] | None = Field(
        min_length=6, max_length=6, description="characters in 5-, 6-, ... 10-grams that repeat an earlier one"
    )


def judge_repetition(text: str, words: Sequence[str], params: Repetition) -> Verdict:
    """Apply Gopher's repetition rules."""
    for name, separator, max_share, max_character_share in (
        ("line", "\n", params.max_line_share, params.max_line_character_share),
        ("paragraph", "\n\n", params.max_paragraph_share, params.max_paragraph_character_share),
    ):
        if max_share is None and max_character_share is None:
            continue
        parts = [part for part in map(str.strip, text.split(separator)) if part]
        if len(parts) < 2:
            continue
        share, character_share = repeated_part_shares(parts)
        if max_share is not None and share > max_share:
            return f"gopher_repeated_{name}s", f"{share:.3f} of the {name}s"
        if max_character_share is not None and character_share > max_character_share:
            return f"gopher_repeated_{name}_characters", f"{character_share:.3f} of the characters"
    top = dict(zip(range(2, 5), params.max_top_ngram_shares or [], strict=False))
    repeated = dict(zip(range(5, 11), params.max_repeated_ngram_shares or [], strict=False))
    if not top and not repeated:
        return None
    codes, lengths = encode(words)
    hashes = codes
    for n in range(2, min(len(words), max([*top, *repeated])) + 1):
        hashes = extend(hashes, codes, n - 1)
        if n in top and (share := top_share(hashes, lengths, n)) > top[n]:
            return f"gopher_top_{n}_gram", f"{share:.3f} of the characters"
        if n in repeated and (share := repeated_share(hashes, lengths, n)) > repeated[n]:
            return f"gopher_repeated_{n}_grams", f"{share:.3f} of the characters"
    return None


def repeated_part_shares(parts: Sequence[str]) -> tuple[float, float]:
    """Return the share of parts that repeat an earlier one, and the share of characters in them."""
    first = set(parts)
    num_characters = sum(map(len, parts))
    repeated_characters = num_characters - sum(map(len, first))
    return 1 - len(first) / len(parts), repeated_characters / num_characters


def encode(words: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return a number for each word, equal for equal words, and each word's characters: [W] and [W]."""
    import numpy as np

    numbers: dict[str, int] = {}
    codes = np.array([numbers.setdefault(word, len(numbers) + 1) for word in words], dtype=np.uint64)
    return codes, np.array([len(word) for word in words], dtype=np.int64)


def extend(hashes: NDArray[np.uint64], codes: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """Turn hashes of the n-grams at each place, [N], into those of the (n + 1)-grams, [N - 1]."""
    import numpy as np

    mixed = hashes[:-1] * np.uint64(_MULTIPLIERS[0]) + codes[n:]
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(_MULTIPLIERS[1])
    return mixed ^ (mixed >> np.uint64(32))


def top_share(hashes: NDArray[np.uint64], lengths: NDArray[np.int64], n: int) -> float:
    """Return the share of characters in the most frequent n-gram (the first on a tie); 0 if none occurs twice."""
    import numpy as np

    again, places = _sort(hashes)
    runs = np.flatnonzero(np.concatenate([[True], ~again, [True]]))
    counts = np.diff(runs)
    highest = counts.max()
    if highest < 2:
        return 0.0
    ends = np.concatenate([[0], np.cumsum(lengths)])
    start = places[runs[:-1][counts == highest]].min()
    return min(1.0, float((ends[start + n] - ends[start]) * highest / ends[-1]))


def repeated_share(hashes: NDArray[np.uint64], lengths: NDArray[np.int64], n: int) -> float:
    """Return the share of characters in n-grams that repeat an earlier one, each character counted once."""
    import numpy as np

    again, places = _sort(hashes)
    if not again.any():
        return 0.0
    starts = places[1:][again]
    depth = np.zeros(len(lengths) + 1, dtype=np.int64)
    depth[starts] += 1
    depth[starts + n] -= 1
    covered = np.cumsum(depth[:-1]) > 0
    return float(lengths[covered].sum() / lengths.sum())


def _sort(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Sort n-grams by hash, then place; return [N - 1] whether each equals the one before it, and [N] their places.

    Hash and place are sorted as one number: a plain sort is several times faster than an indirect one.
    """
    import numpy as np

    num = len(hashes)
    place_bits = np.uint64(max(1, (num - 1).bit_length()))
    keys = (hashes >> place_bits << place_bits) | np.arange(num, dtype=np.uint64)
    keys.sort()
    high = keys >> place_bits
    places = keys & ((np.uint64(1) << place_bits) - np.uint64(1))
    return high[1:] == high[:-1], places.astype(np.int64)
