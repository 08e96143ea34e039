"""How a stage starts and ends: with atomic output, a closed record, and an exit status that says what happened.

A stage module defines `Params(Section)` and `run(stage)`, and ends with::

    if __name__ == "__main__":
        start(Params, run)

`run` writes files below `stage.output`, tables to be plotted with `stage.plot`, tables to be read with `stage.show`; it
returns the stage's figures.
When it returns, `stage.output` becomes data/<place>/ in one rename, so that a stage that dies leaves no partial output.
What it keeps in `stage.scratch` survives if the stage dies, or DVC after it (scratch.py). The figures go to
metrics.json: DVC compares them, so they must be the same on every run (no times, no speeds; those go to `stage.log`).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic

from tasks.running.files import read_json, write_json
from tasks.running.fingerprint import Identity, fingerprint
from tasks.running.names import is_metric_name
from tasks.running.params import Machine, ParamsType, Tracking, parse_section, read_params, seed_of
from tasks.running.places import DATA, RUNS, SCRATCH, entry_of, place_of, section_of
from tasks.running.plots import Plot, write_plot, write_table
from tasks.running.processes import (
    FINGERPRINT_ARGUMENT,
    LOCKED_ARGUMENT,
    PIPELINE_VARIABLE,
    argument,
    die_with_parent,
    pipeline_id,
    pipeline_lock,
)
from tasks.running.record import close_record, code_revision, end_sender, metric_lines, open_record, start_sender
from tasks.running.scratch import FAILURES, FINISHED, IDENTITY, OUTPUT, in_use, sweep, tell_of_other_states

if TYPE_CHECKING:
    import pandas as pd

WAITING = 75  # exit status of a stage that waits (EX_TEMPFAIL of sysexits.h)
WAITING_FILE = "waiting.txt"  # below .scratch/<stage>/: what it waits for; DVC passes on no exit status


class RankFailedError(Exception):
    """Raised on rank 0 when another rank has failed, with that rank's error: the cause of what rank 0 saw."""


class Waiting(Exception):  # noqa: N818 - nothing is wrong
    """Raised in `run` by a stage that needs something from people: `waiting for <what>, put them at <where>`."""


@dataclass
class Stage(Generic[ParamsType]):
    """One run of one stage: its inputs, and where it writes."""

    name: str
    params: ParamsType
    seed: int
    machine: Machine
    output: Path
    scratch: Path
    record: Path
    rank: int = 0
    _last_step: dict[str, int] = field(default_factory=dict)

    @property
    def section(self) -> str:
        """The section of params.yaml that the stage reads."""
        return section_of(self.name)

    @property
    def entry(self) -> str:
        """The round or checkpoint that this one of its section's stages is about; empty if there is only one stage."""
        return entry_of(self.name)

    def log(self, metrics: Mapping[str, float], step: int, tokens: int | None = None) -> None:
        """Append metrics to the record; MLflow shows them against steps, and also against tokens if given.

        A resumed stage may log steps again: what the record already holds stays as it is.
        Only rank 0 writes. Raises ValueError for a value that is not a number.
        """
        if self.rank != 0:
            return
        for name, value in metrics.items():
            if not isinstance(value, int | float):
                raise ValueError(f"metric `{name}` is {value!r}: only numbers can be logged")
            assert is_metric_name(name), f"MLflow does not accept the metric `{name}`: make its name with metric_name"
        fresh = {name: float(value) for name, value in metrics.items() if step > self._last_step.get(name, -1)}
        if not fresh:
            return
        self._last_step.update(dict.fromkeys(fresh, step))
        line = {"step": step, "tokens": tokens, "time": time.time(), "metrics": fresh}
        with (self.record / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def plot(self, name: str, table: pd.DataFrame, plot: Plot) -> None:
        """Write a table to plots/NAME.csv, with the way `report` and `dvc plots show` plot it."""
        write_plot(self.output / "plots", name, table, plot)

    def show(self, name: str, table: pd.DataFrame, title: str) -> None:
        """Write a table to tables/NAME.csv, which `report` shows as it is."""
        write_table(self.output / "tables", name, table, title)

    @property
    def artifacts(self) -> Path:
        """Directory for files to show in MLflow: plots (.png, .html), texts. Not versioned by DVC."""
        path = self.record / "artifacts"
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def tables(self) -> Path:
        """Directory for tables to show in MLflow: one NAME.csv per table."""
        path = self.record / "tables"
        path.mkdir(parents=True, exist_ok=True)
        return path


def start(params_model: type[ParamsType], run: Callable[[Stage[ParamsType]], Mapping[str, float]]) -> None:
    """Run the stage whose module was started (`python -m tasks.<stage> [item]`), and exit with its status.

    Reads params.yaml and dvc.yaml in the working directory. A ValueError or a full disk ends the stage with one message
    and exit status 1, any other exception with its traceback; SIGINT and SIGTERM end it with status 130, `Waiting` with
    its line and status 75: the next run checks again for what it waited for.
    """
    die_with_parent()
    signal.signal(signal.SIGTERM, _interrupt)
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "a stage is started as a module"
    module = spec.name.removesuffix(".__main__").removeprefix("tasks.")
    name = "@".join([module, *(argument for argument in sys.argv[1:] if not argument.startswith("--"))])
    status = _status_of(name, module, params_model, run)
    if argument(FINGERPRINT_ARGUMENT) is None:
        sys.exit(status)
    # A rank exits without Python's shutdown: gloo's threads may still be releasing the last exchange's tensors, which
    # needs the interpreter, and one that is shutting down aborts the process (pytorch's issue 190489). Destroying the
    # process group first doesn't help: torch and DeepSpeed keep references to it, and its threads live on.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _status_of(
    name: str,
    module: str,
    params_model: type[ParamsType],
    run: Callable[[Stage[ParamsType]], Mapping[str, float]],
) -> int:
    """Run a stage; if it fails, say why; return the exit status."""
    try:
        _run_stage(name, module, params_model, run)
    except ValueError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return 1
    except Waiting as waiting:
        sys.stderr.write(f"{name}: {waiting}\n")
        return WAITING
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: stopped; earlier results are untouched, the next run continues from here\n")
        return 130
    except RankFailedError as error:  # that rank has printed its traceback
        sys.stderr.write(f"{name}: {error}\n")
        return 1
    except Exception as error:  # noqa: BLE001 - reported in full, and by the exit status
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            sys.stderr.write(f"{name}: {full_disk(error)}\n")
        else:
            traceback.print_exc()
        return 1
    return 0


def full_disk(error: OSError) -> str:
    """Return the message for a full disk."""
    place = error.filename or "the output"
    return f"the disk is full (writing {place}): free space and run again; earlier results are untouched"


def _interrupt(signal_number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _run_stage(
    name: str,
    module: str,
    params_model: type[ParamsType],
    run: Callable[[Stage[ParamsType]], Mapping[str, float]],
) -> None:
    """Run one stage, opening its record before and closing it after."""
    # Only our launcher makes ranks, and tells them the fingerprint; another one may have left its variables.
    rank = int(os.environ["RANK"]) if argument(FINGERPRINT_ARGUMENT) is not None else 0
    values = read_params()
    params = parse_section(params_model, values, module)
    machine = parse_section(Machine, values, "machine")
    tracking = parse_section(Tracking, values, "tracking")
    seed = seed_of(values)
    identity = _identity_of(name)
    place = place_of(name)
    scratch = SCRATCH / place / identity.digest
    stage = Stage(name, params, seed, machine, scratch / OUTPUT, scratch, RUNS / place / identity.digest, rank)
    if rank != 0:
        _run_beside_rank_0(stage, run)
        return
    header = {
        "stage": name,
        "fingerprint": identity.digest,
        "pipeline": pipeline_id(),
        "experiment": tracking.experiment,
        "params": identity.params,
        "datasets": identity.datasets,
        "code": code_revision(),
        "output": str(DATA / place),
    }
    locked = PIPELINE_VARIABLE in os.environ or LOCKED_ARGUMENT in sys.argv
    with nullcontext() if locked else pipeline_lock(f"stage {name}"):
        sweep()
        with in_use(place):
            _run_as_rank_0(stage, run, header)


def _identity_of(name: str) -> Identity:
    """Return the stage's identity: the one the launcher determined for its ranks, on any host, or else our own."""
    digest = argument(FINGERPRINT_ARGUMENT)
    if digest is None:
        return fingerprint(name)
    return Identity(**read_json(SCRATCH / place_of(name) / digest / IDENTITY))


def _run_as_rank_0(
    stage: Stage[ParamsType], run: Callable[[Stage[ParamsType]], Mapping[str, float]], header: Mapping[str, Any]
) -> None:
    """Run the stage, put its output in place, and record how it ended."""
    tell_of_other_states(stage.name, stage.scratch.name)
    (stage.scratch / FINISHED).unlink(missing_ok=True)
    shutil.rmtree(stage.output, ignore_errors=True)
    stage.output.mkdir(parents=True)
    record = stage.record
    open_record(record, header)
    stage._last_step = {metric: line["step"] for line in metric_lines(record) for metric in line["metrics"]}
    sender = start_sender(record)
    try:
        figures = run(stage)
        _publish_output(stage, figures)
        close_record(record, "FINISHED")
    except Waiting as waiting:
        shutil.rmtree(stage.scratch)  # what people bring gives the next run another fingerprint
        (stage.scratch.parent / WAITING_FILE).write_text(f"{waiting}\n", encoding="utf-8")
        close_record(record, "KILLED", str(waiting))
        raise
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher stops all ranks when one fails: we know already
        cause = None if isinstance(error, ValueError) else _failure_of_another_rank(stage.scratch)
        if cause is not None:
            close_record(record, "FAILED", cause["error"], cause["traceback"])
            raise RankFailedError(cause["error"]) from None
        if isinstance(error, KeyboardInterrupt):
            close_record(record, "KILLED")
        else:
            close_record(record, "FAILED", f"{type(error).__name__}: {error}", traceback.format_exc())
        raise
    finally:
        end_sender(sender)


def _run_beside_rank_0(stage: Stage[ParamsType], run: Callable[[Stage[ParamsType]], Mapping[str, float]]) -> None:
    """Run the stage on another rank; write any failure to a file: rank 0 only sees a rank vanish, or is stopped."""
    try:
        run(stage)
    except Exception as error:
        words = f"rank {stage.rank}: {type(error).__name__}: {error}"
        failure = {"time": time.time(), "error": words, "traceback": traceback.format_exc()}
        write_json(stage.scratch / FAILURES.replace("*", str(stage.rank)), failure)
        raise


def _failure_of_another_rank(scratch: Path) -> dict[str, Any] | None:
    """Return the failure of the first rank that failed, or None; later ones fail because it is missing."""
    failures = [read_json(path) for path in scratch.glob(FAILURES)]
    return min(failures, key=lambda failure: float(failure["time"]), default=None)


def _publish_output(stage: Stage[Any], figures: Mapping[str, float]) -> None:
    """Move the finished output to its place, and write its figures to metrics.json and the record."""
    bad = {name: value for name, value in figures.items() if not isinstance(value, int | float) or value != value}
    assert not bad, f"figures that are not numbers: {bad}"
    unnamed = [name for name in figures if not is_metric_name(name)]
    assert not unnamed, f"MLflow does not accept the metrics {unnamed}: make their names with metric_name"
    write_json(stage.output / "metrics.json", dict(figures))
    write_json(stage.record / "figures.json", dict(figures))
    put_in_place(stage.output, DATA / place_of(stage.name))
    (stage.scratch / IDENTITY).unlink(missing_ok=True)
    if any(stage.scratch.iterdir()):
        (stage.scratch / FINISHED).touch()
    else:
        stage.scratch.rmdir()


def put_in_place(output: Path, place: Path) -> None:
    """Move a finished output to its place in one rename; from another volume, copy it beside that place first."""
    place.parent.mkdir(parents=True, exist_ok=True)
    complete = output
    if output.stat().st_dev != place.parent.stat().st_dev:
        complete = place.with_name(f".{place.name}.partial")
        shutil.rmtree(complete, ignore_errors=True)
        shutil.copytree(output, complete, symlinks=True)
    if place.exists():
        shutil.rmtree(place)
    complete.replace(place)
    shutil.rmtree(output, ignore_errors=True)
