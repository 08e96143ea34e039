"""Metric names, whatever users call their data: MLflow accepts all of them, and no two collide."""

from __future__ import annotations

import re

from tasks.running.digests import number_of

RESERVED = frozenset({"all", "step", "tokens"})  # our own names, used beside names of data: totals, columns of curves
LONGEST_PART = 80  # characters of a name of data
LONGEST_NAME = 240  # characters of a metric name: MLflow's limit, less the `by_tokens/` that may precede it
PART = re.compile(r"(?!\.)[\w.\- ]+")  # MLflow treats names as paths; it also accepts a colon, but not on Windows
NOT_ALLOWED = re.compile(r"^\.|[^\w.\- ]")
WITH_DIGEST = re.compile(r".*_[0-9a-f]{8}")


def metric_name(*parts: str) -> str:
    """Return a metric name made of names of data and of our own: the parts joined by slashes.

    A part that MLflow accepts is kept. In any other part, each character that is not allowed becomes an underscore, and
    a digest of the part is appended, so that different parts stay different. A part that is reserved, too long, or
    looks like one with a digest gets a digest too.
    """
    return "/".join(map(_part, parts))


def _part(name: str) -> str:
    """Return a name as one part of a metric name."""
    stays = PART.fullmatch(name) and name == name.strip() and len(name) <= LONGEST_PART
    if stays and name not in RESERVED and not WITH_DIGEST.fullmatch(name):
        return name
    return f"{NOT_ALLOWED.sub('_', name)[:LONGEST_PART]}_{number_of(name, num_bytes=4):08x}"


def is_metric_name(name: str) -> bool:
    """Return whether MLflow accepts a metric of this name."""
    return len(name) <= LONGEST_NAME and all(PART.fullmatch(part) for part in name.split("/"))
