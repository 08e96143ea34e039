"""Names of metrics, whatever people call their data: MLflow takes them all, and no two meet."""

from __future__ import annotations

import re

from tasks.running.digests import number_of

RESERVED = frozenset({"all", "step", "tokens"})  # this project's own, beside names of data: totals, columns of curves
LONGEST_PART = 80  # characters of a name of data
LONGEST_NAME = 240  # characters of a metric's name: MLflow's limit, less the `by_tokens/` that may come before it
PART = re.compile(r"(?!\.)[\w.\- ]+")  # MLflow reads names as paths, and takes a colon as well, but not on Windows
TAKEN_NOT = re.compile(r"^\.|[^\w.\- ]")
WITH_DIGEST = re.compile(r".*_[0-9a-f]{8}")


def metric_name(*parts: str) -> str:
    """Return names of data, and ours around them, as a metric's name: the parts with slashes between them.

    A part that MLflow takes stays. In another each character that it takes not becomes an underscore, and a digest of
    the part follows, so that different parts stay different; so it does behind a part that is reserved, too long, or
    could be one with a digest.
    """
    return "/".join(map(_part, parts))


def _part(name: str) -> str:
    """A name as one part of a metric's name."""
    stays = PART.fullmatch(name) and name == name.strip() and len(name) <= LONGEST_PART
    if stays and name not in RESERVED and not WITH_DIGEST.fullmatch(name):
        return name
    return f"{TAKEN_NOT.sub('_', name)[:LONGEST_PART]}_{number_of(name, num_bytes=4):08x}"


def is_metric_name(name: str) -> bool:
    """Tell whether MLflow takes a metric of this name."""
    return len(name) <= LONGEST_NAME and all(PART.fullmatch(part) for part in name.split("/"))
