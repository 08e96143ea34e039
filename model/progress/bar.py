"""Every bar of progress: it moves on a terminal, and in a log it is a line now and then."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS_ON_A_TERMINAL = 0.1
SECONDS_IN_A_LOG = 10.0


def progress_bar(total: int, description: str | None, unit: str, *, done: int = 0, scaled: bool = False) -> Any:
    """Return tqdm's bar of `total` units, of which `done` are there already; None as `description`: it is not shown.

    In a log (stderr is no terminal) it writes a line when it begins, at most one every ten seconds, and a last one.
    `scaled` writes large numbers short: 4.5M.
    """
    seconds = SECONDS_ON_A_TERMINAL if sys.stderr.isatty() else SECONDS_IN_A_LOG
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=unit,
        unit_scale=scaled,
        mininterval=seconds,
        miniters=1,  # given, it keeps tqdm's own thread from a line between two
        disable=description is None,
    )
