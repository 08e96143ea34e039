"""Numbers that a text decides, the same on every machine: draws that need no order and no memory."""

from __future__ import annotations

import hashlib


def number_of(text: str, num_bytes: int = 6) -> int:
    """Return a number below 256 ** num_bytes; six bytes, below 2 ** 48, fit whole into a float."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:num_bytes], "big")


def fraction_of(text: str) -> float:
    """Return a number from 0 to below 1."""
    return number_of(text) / 2**48
