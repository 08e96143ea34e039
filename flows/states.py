"""The states that stopped stages can resume from: `python -m flows.states`.

    python -m flows.states                           list them, and the records that MLflow does not have yet
    python -m flows.states clear [STAGE ...]         remove them, of all stages or of some
    python -m flows.states adopt STAGE FINGERPRINT   resume a stage from one after a change that affects no result

A state belongs to the code, data and parameters that it was written with: after any change the stage starts over, as
with DVC. Only you know that a change, to a comment for instance, affects no result. Confirm it with
`dvc commit STAGE` for a stage that had finished, and with `adopt` for one that was stopped half-way.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tasks.running.fingerprint import fingerprint
from tasks.running.places import RUNS, SCRATCH, place_of
from tasks.running.scratch import State, described, is_running, kept_states, remove, sweep
from tasks.steering.tracking import fully_sent

USAGE = __doc__.split("\n\n")[1]


def listing() -> str:
    """Return one line for each state, and for each record that waits to be sent."""
    lines = [described(state) for state in kept_states()]
    waiting = [path.parent for path in sorted(RUNS.glob("**/run.json")) if not fully_sent(path.parent)]
    lines += [f"{record}  waits to be sent to MLflow: `dvc repro -f -s publish` sends it" for record in waiting]
    return "".join(f"{line}\n" for line in lines) or "No stopped stage has left a state.\n"


def chosen(stages: Sequence[str]) -> list[State]:
    """Return the states of the given stages, or of all.

    Raises ValueError for a stage that is running, and for one without a state, naming those that have one.
    """
    for stage in stages:
        if is_running(place_of(stage)):
            raise ValueError(f"`{stage}` is running and uses its state: stop it first")
    states = kept_states()
    for stage in stages:
        if stage not in [state.stage for state in states]:
            names = ", ".join(sorted({state.stage for state in states})) or "no stage"
            raise ValueError(f"`{stage}` has left no state; {names} has")
    return [state for state in states if not stages or state.stage in stages]


def adopt(stage: str, digest: str) -> Path:
    """Give a stage, as it is now, the state that it wrote under another fingerprint; return the new directory.

    Raises ValueError as `chosen` does, when there is no such state, and when the current stage has a state already.
    """
    states = {state.fingerprint: state for state in chosen([stage])}
    if digest not in states:
        raise ValueError(f"`{stage}` has left no state {digest}: `python -m flows.states` lists the existing ones")
    now = fingerprint(stage).digest
    directory = SCRATCH / place_of(stage) / now
    if now in states:
        raise ValueError(f"`{stage}` already resumes from {directory}: clear that first to resume from another state")
    remove(directory)
    return states[digest].directory.rename(directory)


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    try:
        sweep()
        match arguments:
            case []:
                sys.stdout.write(listing())
            case ["clear", *stages]:
                for state in chosen(stages):
                    remove(state.directory)
                    sys.stdout.write(f"removed: {described(state)}\n")
            case ["adopt", stage, digest]:
                sys.stdout.write(f"{stage} resumes from {adopt(stage, digest)} when it runs next.\n")
            case _:
                raise ValueError(f"unknown command; usage:\n\n{USAGE}")
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
