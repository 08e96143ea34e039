"""Progress bars: they move on a terminal, and print a line now and then in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

SECONDS_ON_A_TERMINAL = 0.1
SECONDS_IN_A_LOG = 10.0


def progress_bar(total: int, description: str | None, unit: str, *, done: int = 0, scaled: bool = False) -> Any:
    """Return tqdm's bar for `total` units, of which `done` are finished already; a `description` of None hides it.

    In a log (stderr is not a terminal) it writes a line at the start, then at most one every ten seconds, and a last
    one. `scaled` abbreviates large numbers: 4.5M.
    """
    seconds = SECONDS_ON_A_TERMINAL if sys.stderr.isatty() else SECONDS_IN_A_LOG
    return tqdm(
        total=total,
        initial=done,
        desc=description,
        unit=unit,
        unit_scale=scaled,
        mininterval=seconds,
        miniters=1,  # if it is set, tqdm's own thread writes no extra lines
        disable=description is None,
    )
