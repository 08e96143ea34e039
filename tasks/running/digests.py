"""Numbers determined by a text, the same on every machine: random draws without order or state."""

from __future__ import annotations

import hashlib


def number_of(text: str, num_bytes: int = 6) -> int:
    """Return a text's number below 256 ** num_bytes; six bytes, below 2 ** 48, fit exactly into a float."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:num_bytes], "big")


def fraction_of(text: str) -> float:
    """Return a text's number in [0, 1)."""
    return number_of(text) / 2**48
