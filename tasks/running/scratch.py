"""What stages keep to go on from, in .scratch/<place>/<fingerprint>/: who uses it, and when it may go.

A stage that ends well leaves its states there, marked as finished, and only when dvc.lock holds its fingerprint does
`sweep` remove them: until then DVC hashes, copies and locks the output, which may take long and may be interrupted, and
the stage then ends again from its last state and doesn't begin anew.
"""

from __future__ import annotations

import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tasks.running.fingerprint import locked_fingerprints
from tasks.running.places import SCRATCH, name_of, place_of

FINISHED = "finished"  # marks a stage's scratch once its output is in place
IDENTITY = "identity.json"  # what the launcher has found out about the stage, for its ranks
FAILURES = "failure-*.json"  # what ranks other than 0 have failed of; a launcher begins without them
OUTPUT = "output"
FINGERPRINT = re.compile("[0-9a-f]{16}")


class State(NamedTuple):
    """What a stage that was stopped has left to go on from."""

    stage: str
    fingerprint: str
    directory: Path
    num_bytes: int
    changed: float  # seconds since the epoch


@contextmanager
def in_use(place: Path) -> Iterator[None]:
    """Show, for as long as the block lasts, that a stage runs: nobody removes its scratch or ends its record.

    Raises filelock.Timeout when it runs already.
    """
    from filelock import FileLock

    (SCRATCH / place).mkdir(parents=True, exist_ok=True)
    with FileLock(SCRATCH / place / "running.lock", timeout=0):
        yield


def is_running(place: Path) -> bool:
    """Tell whether a stage runs in this workspace."""
    from filelock import Timeout

    try:
        with in_use(place):
            return False
    except Timeout:
        return True


def kept_states() -> list[State]:
    """Return what stopped stages have left, the newest first; those that run or have finished have left nothing."""
    directories = (*SCRATCH.glob("*/*"), *SCRATCH.glob("*/*/*"))
    places = {path.parent.relative_to(SCRATCH) for path in directories if FINGERPRINT.fullmatch(path.name)}
    states = [state for place in places if not is_running(place) for state in states_of(place)]
    return sorted(states, key=lambda state: -state.changed)


def states_of(place: Path) -> list[State]:
    """Return what one stage has kept when it was stopped, the newest first."""
    states = []
    for directory in (SCRATCH / place).iterdir():
        if not FINGERPRINT.fullmatch(directory.name) or (directory / FINISHED).exists():
            continue
        passing = {directory / IDENTITY, directory / OUTPUT, *directory.glob(FAILURES)}
        kept = [path for path in directory.iterdir() if path not in passing]
        files = [file for path in kept for file in (path, *path.rglob("*")) if file.is_file()]
        if files:
            sizes, times = zip(*((file.stat().st_size, file.stat().st_mtime) for file in files), strict=True)
            states.append(State(name_of(place), directory.name, directory, sum(sizes), max(times)))
    return sorted(states, key=lambda state: -state.changed)


def described(state: State) -> str:
    """Return a line about a state."""
    hours = (time.time() - state.changed) / 3600
    age = f"{hours:.0f} hours" if hours >= 2 else f"{hours * 60:.0f} minutes"
    return f"{state.stage} {state.fingerprint}  {state.num_bytes / 2**20:,.1f} MiB, written {age} ago"


def tell_of_other_states(name: str, digest: str) -> None:
    """Say, where a stage begins anew, which states it leaves behind and how to go on from them."""
    own = states_of(place_of(name))
    if not own or any(state.fingerprint == digest for state in own):
        return
    lines = "".join(f"  {described(state)}\n" for state in own)
    sys.stderr.write(
        f"{name}: begins anew: its code, data or parameters have changed since it was stopped and left\n{lines}"
        "To go on from one, undo the change; or, where the change changes no result, stop this run and say\n"
        f"  python -m flows.states adopt {name} {own[0].fingerprint}\n"
        f"`python -m flows.states clear {name}` removes them.\n"
    )


def remove(directory: Path) -> None:
    """Remove a stage's scratch, whether it is there or not."""
    if directory.exists():
        shutil.rmtree(directory)


def sweep() -> None:
    """Remove what finished stages have kept, if dvc.lock holds them and they don't run again."""
    from filelock import Timeout

    markers = [*SCRATCH.glob(f"*/*/{FINISHED}"), *SCRATCH.glob(f"*/*/*/{FINISHED}")]
    if not markers:
        return
    locked = locked_fingerprints()
    for directory in (marker.parent for marker in markers):
        if directory.name not in locked:
            continue
        try:
            with in_use(directory.parent.relative_to(SCRATCH)):
                remove(directory)
        except Timeout:
            continue  # the stage runs again and needs it
