"""Finished pieces of work, kept over a kill: each is there in full, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4


def finish_once(directory: Path, fill: Callable[[Path], None]) -> None:
    """Have `fill` write a directory's files; do nothing where an earlier run has finished that.

    It fills a new directory, which gets its name in one rename. Of two that fill it at once (a cluster's worker may go
    on when its run was killed) the first to end wins: both write the same bytes.
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
    """Give a finished file a second name in the output, so that it is kept until the stage has succeeded.

    It is copied where the file system has no hard links, or the two lie on different ones.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
