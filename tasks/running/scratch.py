"""The states that stages resume from, in .scratch/<place>/<fingerprint>/: who uses them, and when they are removed.

A stage that succeeds leaves its states there, marked as finished. `sweep` removes them only when dvc.lock holds the
stage's fingerprint: until then DVC hashes, copies and locks the output, which may take long and may be interrupted. The
stage then finishes again from its last state, and doesn't start over.
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
IDENTITY = "identity.json"  # the stage's identity, which the launcher has determined for its ranks
FAILURES = "failure-*.json"  # errors of ranks other than 0; a launcher removes them before it starts
OUTPUT = "output"
FINGERPRINT = re.compile("[0-9a-f]{16}")


class State(NamedTuple):
    """What a stopped stage has left to resume from."""

    stage: str
    fingerprint: str
    directory: Path
    num_bytes: int
    changed: float  # seconds since the epoch


@contextmanager
def in_use(place: Path) -> Iterator[None]:
    """Mark a stage as running, for as long as the block lasts: nobody removes its scratch or ends its record.

    Raises filelock.Timeout when it is running already.
    """
    from filelock import FileLock

    (SCRATCH / place).mkdir(parents=True, exist_ok=True)
    with FileLock(SCRATCH / place / "running.lock", timeout=0):
        yield


def is_running(place: Path) -> bool:
    """Return whether a stage is running in this workspace."""
    from filelock import Timeout

    try:
        with in_use(place):
            return False
    except Timeout:
        return True


def kept_states() -> list[State]:
    """Return what stopped stages have left, the newest first; running and finished stages don't count."""
    directories = (*SCRATCH.glob("*/*"), *SCRATCH.glob("*/*/*"))
    places = {path.parent.relative_to(SCRATCH) for path in directories if FINGERPRINT.fullmatch(path.name)}
    states = [state for place in places if not is_running(place) for state in states_of(place)]
    return sorted(states, key=lambda state: -state.changed)


def states_of(place: Path) -> list[State]:
    """Return what one stage has left each time it was stopped, the newest first."""
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
    """Return a line that describes a state."""
    hours = (time.time() - state.changed) / 3600
    age = f"{hours:.0f} hours" if hours >= 2 else f"{hours * 60:.0f} minutes"
    return f"{state.stage} {state.fingerprint}  {state.num_bytes / 2**20:,.1f} MiB, written {age} ago"


def tell_of_other_states(name: str, digest: str) -> None:
    """If a stage starts over, print which states it leaves behind and how to resume from them."""
    own = states_of(place_of(name))
    if not own or any(state.fingerprint == digest for state in own):
        return
    lines = "".join(f"  {described(state)}\n" for state in own)
    sys.stderr.write(
        f"{name}: starts over: its code, data or parameters have changed since it was stopped and left\n{lines}"
        "To resume from one, undo the change; or, if the change affects no result, stop this run and run\n"
        f"  python -m flows.states adopt {name} {own[0].fingerprint}\n"
        f"`python -m flows.states clear {name}` removes them.\n"
    )


def remove(directory: Path) -> None:
    """Remove a stage's scratch, if it exists."""
    if directory.exists():
        shutil.rmtree(directory)


def sweep() -> None:
    """Remove what finished stages have left, if dvc.lock holds them and they are not running again."""
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
            continue  # the stage is running again and needs it
