"""What stopped stages have left to go on from: `python -m flows.states`.

    python -m flows.states                           lists it, with the records that MLflow does not have yet
    python -m flows.states clear [STAGE ...]         removes it, of all stages or of some
    python -m flows.states adopt STAGE FINGERPRINT   lets a stage go on from it after a change that changes no result

A state belongs to the code, data and parameters that it was written with: after any change the stage begins anew, as
DVC would. Only you know of a change that it changes no result, a comment for instance. A stage that had finished is
told so by `dvc commit STAGE`, one that was stopped half way by `adopt`.
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
    """Return a line for each state, and for each record that waits to be sent."""
    lines = [described(state) for state in kept_states()]
    waiting = [path.parent for path in sorted(RUNS.glob("**/run.json")) if not fully_sent(path.parent)]
    lines += [f"{record}  waits to be sent to MLflow: `dvc repro -f -s publish` sends it" for record in waiting]
    return "".join(f"{line}\n" for line in lines) or "Nothing is left of stopped stages.\n"


def chosen(stages: Sequence[str]) -> list[State]:
    """Return the states of some stages, or of all.

    Raises ValueError for a stage that runs, and for one that has none, naming those that have.
    """
    for stage in stages:
        if is_running(place_of(stage)):
            raise ValueError(f"`{stage}` runs, and has its state in use: stop it first")
    states = kept_states()
    for stage in stages:
        if stage not in [state.stage for state in states]:
            names = ", ".join(sorted({state.stage for state in states})) or "no stage"
            raise ValueError(f"`{stage}` has left no state; {names} has")
    return [state for state in states if not stages or state.stage in stages]


def adopt(stage: str, digest: str) -> Path:
    """Give a stage, as it is now, the state that it wrote under another fingerprint; return where it lies now.

    Raises ValueError as `chosen`, and when there is no such state or the stage has one of its own.
    """
    states = {state.fingerprint: state for state in chosen([stage])}
    if digest not in states:
        raise ValueError(f"`{stage}` has left no state {digest}: `python -m flows.states` lists those that there are")
    now = fingerprint(stage).digest
    directory = SCRATCH / place_of(stage) / now
    if now in states:
        raise ValueError(f"`{stage}` goes on from {directory} already: clear that first to begin from another state")
    remove(directory)
    return states[digest].directory.rename(directory)


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks for; return the exit status."""
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
                sys.stdout.write(f"{stage} goes on from {adopt(stage, digest)} when it runs next.\n")
            case _:
                raise ValueError(f"what to do?\n\n{USAGE}")
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
