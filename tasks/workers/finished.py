"""Finished pieces of work that survive a kill: each is complete or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4


def finish_once(directory: Path, fill: Callable[[Path], None]) -> None:
    """Have `fill` write a directory's files; do nothing if an earlier run has finished it.

    It fills a temporary directory, which gets its name in one rename. If two fill it at once (a cluster's worker may
    continue after its run was killed), the first to finish wins: both write the same bytes.
    """
    if directory.exists():
        return
    unfinished = directory.with_name(f".{directory.name}.{uuid4().hex}")  # process ids repeat on a cluster's hosts
    unfinished.mkdir(parents=True)
    try:
        fill(unfinished)
        try:
            unfinished.rename(directory)
        except OSError:
            if not directory.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """Hard-link a finished file into the output, so that the original is kept until the stage has succeeded.

    It is copied if the file system has no hard links, or the two are on different ones.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
