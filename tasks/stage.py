"""What every stage shares: its parameters, its record for MLflow, an atomic output and a directory to resume from.

A stage module defines `Params(Section)` and `run(stage)`, and ends with::

    if __name__ == "__main__":
        start(Params, run)

`run` writes files below `stage.output` and returns the stage's figures. When it returns, `stage.output` becomes
data/<stage>/ in one rename, so that a stage that dies leaves nothing half done. The figures go to metrics.json there:
DVC compares them, so they must be the same on every run (no times, no speeds; those go to `stage.log`).

Where things lie:

- data/<stage>/                        the output, versioned by DVC
- .scratch/<stage>/<fingerprint>/      what the stage needs to resume; removed when the stage succeeds
- .runs/<stage>/<fingerprint>/         the record: run.json, metrics.jsonl, artifacts/, tables/; what MLflow is sent
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

PARAMS_FILE = Path("params.yaml")
DATA = Path("data")
SCRATCH = Path(".scratch")
RUNS = Path(".runs")
PIPELINE_LOCK = SCRATCH / "pipeline.lock"
PIPELINE_VARIABLE = "ARRIERO_PIPELINE"  # names the flow run that a stage belongs to; set for child processes only
PIPELINE_ARGUMENT = "--pipeline="  # names the pipeline run to ranks that a launcher starts, on whatever host
LAUNCHER_VARIABLE = "ARRIERO_LAUNCHER"  # process id of the launcher on this host, for the ranks that it starts
LOCKED_ARGUMENT = "--locked"  # tells such ranks that a flow holds the workspace for them
WAITING = 75  # exit status of a stage that waits (EX_TEMPFAIL of sysexits.h)
WAITING_FILE = "waiting.txt"  # below .scratch/<stage>/: what it waits for; DVC passes no exit status on


class Waiting(Exception):  # noqa: N818 - nothing is wrong
    """Raised in `run` by a stage that people have to bring something: `waiting for <what>, put them at <where>`."""


class Section(BaseModel):
    """Base of every section of params.yaml: frozen, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Machine(Section):
    """The machine to run on. Nothing here may change a result, except `threads` and `num_ranks` by rounding."""

    threads: int = Field(gt=0, description="CPU threads of one process")
    workers: int = Field(gt=0, description="processes that clean the corpus")
    scheduler: str | None = Field(description="address of a Dask scheduler; null starts local processes")
    num_ranks: int = Field(gt=0, description="training processes on this host: one a GPU, or CPU processes")
    hostfile: str | None = Field(description="DeepSpeed hostfile for several hosts; null trains on this one")


class Tracking(Section):
    """Where runs are recorded; MLFLOW_TRACKING_URI, MLflow's own variable, chooses the server."""

    experiment: str = Field(min_length=1, description="name of the MLflow experiment")


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a forked child must not import
_PR_SET_PDEATHSIG = 1

SectionType = TypeVar("SectionType", bound=BaseModel)
ParamsType = TypeVar("ParamsType", bound=BaseModel)


def read_params(path: Path = PARAMS_FILE) -> dict[str, Any]:
    """Return params.yaml as a dictionary, read as YAML 1.2 as DVC reads it (`2e-5` is a number).

    Raises ValueError, naming the file and what to do, when it is missing, no YAML, or no mapping.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        values = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: run from the project's root, where it lies") from None
    except YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}, not sections: restore it with `git checkout {path}`")
    return values


def parse_section(model: type[SectionType], values: Mapping[str, Any], name: str) -> SectionType:
    """Return section `name` of params.yaml as its model.

    Raises ValueError with one line for each wrong value; a misspelt key's line names the near match.
    """
    if name not in values:
        near = get_close_matches(name, list(values), n=1)
        hint = f"; did you mean to rename `{near[0]}`?" if near else ""
        raise ValueError(f"params.yaml: section `{name}` is missing{hint}")
    try:
        return model.model_validate(values[name])
    except ValidationError as error:
        lines = [_explain(model, name, detail) for detail in error.errors()]
        # What a misspelt name was meant for is missing, too: once said is enough.
        meant = [line.rpartition("did you mean ")[2].removesuffix("?") for line in lines if "did you mean" in line]
        lines = [line for line in lines if line not in [f"params.yaml: {dotted} is missing" for dotted in meant]]
        raise ValueError("\n".join(lines)) from None


def _explain(model: type[BaseModel], section: str, detail: Any) -> str:
    """One line about one wrong value: its dotted name, what was found, what it must be."""
    keys = [str(part) for part in detail["loc"]]
    dotted = ".".join([section, *keys])
    owner = _model_at(model, keys[:-1])
    fields = list(owner.model_fields) if owner is not None else []
    if detail["type"] == "extra_forbidden":
        near = get_close_matches(keys[-1], fields, n=1)
        hint = (
            f"did you mean `{'.'.join([section, *keys[:-1], near[0]])}`?"
            if near
            else f"known here: {', '.join(fields)}"
        )
        return f"params.yaml: `{dotted}` is not a parameter; {hint}"
    if detail["type"] == "missing":
        return f"params.yaml: `{dotted}` is missing"
    meaning = ""
    if owner is not None and keys and keys[-1] in owner.model_fields:
        description = owner.model_fields[keys[-1]].description
        meaning = f" ({description})" if description else ""
    message = detail["msg"].removeprefix("Value error, ")
    return f"params.yaml: `{dotted}` is {detail['input']!r}: {message}{meaning}"


def _model_at(model: type[BaseModel], keys: list[str]) -> type[BaseModel] | None:
    """The pydantic model that a dotted path of keys leads to, through nested models and dictionaries of models."""
    current: Any = model
    for key in keys:
        if isinstance(current, type) and issubclass(current, BaseModel) and key in current.model_fields:
            current = current.model_fields[key].annotation
        arguments = [a for a in getattr(current, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        if arguments and not (isinstance(current, type) and issubclass(current, BaseModel)):
            current = arguments[0]
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested parameters under their dotted names: `{"sft": {"epochs": 2}}` -> `{"sft.epochs": 2}`."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = value
    return flat


def fingerprint(stage_name: str) -> tuple[str, dict[str, Any], list[dict[str, str]]]:
    """Return the digest of all that decides a stage's result, its parameters, and its dependencies that are data.

    The digest covers what DVC compares: command, digests of the dependencies, parameters. These have dotted names.
    Each data dependency is `{"path", "digest"}`; code is left out of the list (but not out of the digest).
    Raises ValueError when dvc.yaml has no such stage.
    """
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.stage.serialize import to_single_stage_lockfile

    try:
        stages = [stage for stage in Repo().index.stages if stage.addressing.rpartition(":")[2] == stage_name]
        for stage in stages:
            stage.save_deps()
    except DvcException as error:
        raise ValueError(f"dvc.yaml's stage `{stage_name}` can't be read: {error}") from None
    if len(stages) != 1:
        raise ValueError(f"dvc.yaml's stage `{stage_name}` can't be read: {len(stages)} have that name, and one must")
    (stage,) = stages
    entry = to_single_stage_lockfile(stage)
    entry.pop("outs", None)
    digest = hashlib.sha256(json.dumps(entry, sort_keys=True, default=str).encode()).hexdigest()[:16]
    data = [
        {"path": dep["path"], "digest": dep.get("md5") or dep.get("etag") or dep.get("checksum") or ""}
        for dep in entry.get("deps", [])
        if not dep["path"].endswith(".py") and Path(dep["path"]).parts[0] not in ("tasks", "model")
    ]
    return digest, flatten(entry.get("params", {}).get(str(PARAMS_FILE), {})), data


@dataclass
class Stage(Generic[ParamsType]):
    """One run of one stage: what it is given, and where it writes."""

    name: str
    params: ParamsType
    seed: int
    machine: Machine
    output: Path
    scratch: Path
    record: Path
    rank: int = 0
    _last_step: dict[str, int] = field(default_factory=dict)
    _metrics: IO[str] | None = None

    def log(self, metrics: Mapping[str, float], step: int, tokens: int | None = None) -> None:
        """Append metrics to the record; MLflow shows them against steps, and against tokens where given.

        A resumed stage may log steps again: what the record already holds is left as it is.
        Only rank 0 writes. Raises ValueError for a value that is no number.
        """
        if self.rank != 0:
            return
        for name, value in metrics.items():
            if not isinstance(value, int | float):
                raise ValueError(f"metric `{name}` is {value!r}: only numbers can be logged")
        fresh = {name: float(value) for name, value in metrics.items() if step > self._last_step.get(name, -1)}
        if not fresh:
            return
        self._last_step.update(dict.fromkeys(fresh, step))
        if self._metrics is None:
            self._metrics = (self.record / "metrics.jsonl").open("a", encoding="utf-8")
        line = {"step": step, "tokens": tokens, "time": time.time(), "metrics": fresh}
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()

    @property
    def artifacts(self) -> Path:
        """Directory of files to show in MLflow: plots (.png, .html), texts. Not versioned by DVC."""
        path = self.record / "artifacts"
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def tables(self) -> Path:
        """Directory of tables to show in MLflow: one NAME.csv a table."""
        path = self.record / "tables"
        path.mkdir(parents=True, exist_ok=True)
        return path


def metric_lines(record: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of a record's metrics.jsonl; a line cut off by a kill is left out."""
    path = record / "metrics.jsonl"
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def pipeline_id() -> str:
    """Return the identity of the pipeline run that this process belongs to.

    The flow names it in the environment, a launcher's command line in an argument; under a plain `dvc repro` it is
    DVC's process, our parent.
    """
    if PIPELINE_VARIABLE in os.environ:
        return os.environ[PIPELINE_VARIABLE]
    for argument in sys.argv[1:]:
        if argument.startswith(PIPELINE_ARGUMENT):
            return argument.removeprefix(PIPELINE_ARGUMENT)
    import psutil

    parent = psutil.Process(os.getppid())
    return f"{parent.pid}-{int(parent.create_time())}"


@contextmanager
def pipeline_lock(owner: str) -> Iterator[None]:
    """Hold this workspace's only place for a pipeline, for as long as the block lasts.

    Raises ValueError, naming who holds it, when another pipeline runs here.
    """
    from filelock import FileLock, Timeout

    SCRATCH.mkdir(exist_ok=True)
    owner_file = SCRATCH / "pipeline.json"
    lock = FileLock(PIPELINE_LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = owner_file.read_text(encoding="utf-8").strip() if owner_file.exists() else "an unknown process"
        raise ValueError(
            f"another pipeline runs in this workspace ({holder}): wait until it ends, or stop it, then start again"
        ) from None
    try:
        owner_file.write_text(f"{owner}, process {os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def die_with_parent() -> None:
    """Have Linux send SIGTERM to this process when its parent dies, so that no stage outlives its pipeline."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.environ.get(LAUNCHER_VARIABLE, str(os.getppid())) != str(os.getppid()):
        sys.exit("the launcher died before this rank was ready")


def start(params_model: type[ParamsType], run: Callable[[Stage[ParamsType]], Mapping[str, float]]) -> None:
    """Run the stage whose module was started (`python -m tasks.<stage> [item]`), and exit with its status.

    Reads params.yaml and dvc.yaml in the working directory. A ValueError or a full disk ends it with one message and
    exit status 1; any other exception with its traceback; SIGINT and SIGTERM with status 130; `Waiting` with its line
    and status 75, and the next run looks again for what it waited for.
    """
    die_with_parent()
    signal.signal(signal.SIGTERM, _interrupt)
    spec = sys.modules["__main__"].__spec__
    assert spec is not None, "a stage is started as a module"
    module = spec.name.removesuffix(".__main__").removeprefix("tasks.")
    name = "@".join([module, *(argument for argument in sys.argv[1:] if not argument.startswith("--"))])
    status = _status_of(name, module, params_model, run)
    if "RANK" not in os.environ:
        sys.exit(status)
    # A rank leaves without Python's own end: gloo's threads may still let go of the last exchange's tensors, which
    # takes the interpreter, and one that is being taken down aborts the process (pytorch's issue 190489). To destroy
    # the process group first is no cure: torch and DeepSpeed hold on to it, and its threads live on.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _status_of(
    name: str,
    module: str,
    params_model: type[ParamsType],
    run: Callable[[Stage[ParamsType]], Mapping[str, float]],
) -> int:
    """Run a stage, say why it failed if it does, and return the exit status."""
    try:
        _run_stage(name, module, params_model, run)
    except ValueError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return 1
    except Waiting as waiting:
        sys.stderr.write(f"{name}: {waiting}\n")
        return WAITING
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: stopped; earlier results are untouched, the next run goes on from here\n")
        return 130
    except Exception as error:  # noqa: BLE001 - told in full, and by the exit status
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
    """Run one stage between its record's opening and closing."""
    rank = int(os.environ.get("RANK", "0"))
    values = read_params()
    params = parse_section(params_model, values, module)
    machine = parse_section(Machine, values, "machine")
    tracking = parse_section(Tracking, values, "tracking")
    seed = values.get("seed")
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"params.yaml: `seed` is {seed!r}: a whole number >= 0 is needed")
    digest, used, datasets = fingerprint(name)
    place = Path(*name.split("@"))
    scratch = SCRATCH / place / digest
    record = RUNS / place / digest
    output = scratch / "output"
    stage = Stage(name, params, seed, machine, output, scratch, record, rank)
    if rank != 0:
        _run_beside_rank_0(stage, run)
        return
    from contextlib import nullcontext

    locked = PIPELINE_VARIABLE in os.environ or LOCKED_ARGUMENT in sys.argv
    with nullcontext() if locked else pipeline_lock(f"stage {name}"):
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        header = {
            "stage": name,
            "fingerprint": digest,
            "pipeline": pipeline_id(),
            "experiment": tracking.experiment,
            "params": used,
            "datasets": datasets,
            "code": code_revision(),
            "output": str(DATA / place),
        }
        _open_record(record, header)
        stage._last_step = {metric: line["step"] for line in metric_lines(record) for metric in line["metrics"]}
        sender = _start_sender(record)
        try:
            figures = run(stage)
            _publish_output(stage, figures)
            _close_record(record, "FINISHED")
        except Waiting as waiting:
            shutil.rmtree(scratch)  # what is brought gives the next run another fingerprint
            (scratch.parent / WAITING_FILE).write_text(f"{waiting}\n", encoding="utf-8")
            _close_record(record, "KILLED", str(waiting))
            raise
        except KeyboardInterrupt:
            failure = _failure_of_another_rank(scratch)
            _close_record(record, "FAILED" if failure else "KILLED", *failure)
            raise
        except BaseException as error:
            _close_record(record, "FAILED", f"{type(error).__name__}: {error}", traceback.format_exc())
            raise
        finally:
            if stage._metrics is not None:
                stage._metrics.close()
            _end_sender(sender)


def _run_beside_rank_0(stage: Stage[ParamsType], run: Callable[[Stage[ParamsType]], Mapping[str, float]]) -> None:
    """Run the stage on another rank; leave word of a failure, as rank 0 is only told to stop by the launcher."""
    try:
        run(stage)
    except Exception as error:
        words = f"rank {stage.rank}: {type(error).__name__}: {error}"
        failure = {"pipeline": pipeline_id(), "error": words, "traceback": traceback.format_exc()}
        write_json(stage.scratch / "failure.json", failure)
        raise


def _failure_of_another_rank(scratch: Path) -> tuple[str, ...]:
    """Return error and traceback of the rank that failed in this pipeline run; nothing when none did."""
    path = scratch / "failure.json"
    if not path.exists():
        return ()
    failure = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    return (failure["error"], failure["traceback"]) if failure["pipeline"] == pipeline_id() else ()


def _publish_output(stage: Stage[Any], figures: Mapping[str, float]) -> None:
    """Put the finished output in its place, and its figures into metrics.json and the record."""
    bad = {name: value for name, value in figures.items() if not isinstance(value, int | float) or value != value}
    assert not bad, f"figures that are no numbers: {bad}"
    write_json(stage.output / "metrics.json", dict(figures))
    write_json(stage.record / "figures.json", dict(figures))
    place = DATA / Path(*stage.name.split("@"))
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():
        shutil.rmtree(place)
    stage.output.replace(place)
    shutil.rmtree(stage.scratch)


def _open_record(record: Path, header: Mapping[str, Any]) -> None:
    """Open the record for a first run or a resumed one; one that had finished is begun anew."""
    path = record / "run.json"
    now = begun = time.time()
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before["status"] == "FINISHED":
            shutil.rmtree(record)
        else:
            begun = before["begun"]
    metrics = record / "metrics.jsonl"
    if metrics.exists():  # a line that was cut off would swallow the next one
        os.truncate(metrics, metrics.read_bytes().rfind(b"\n") + 1)
    write_json(path, {**header, "status": "RUNNING", "begun": begun, "started": now, "error": None})


def _close_record(record: Path, status: str, error: str | None = None, trace: str | None = None) -> None:
    """Note how the run ended; the record is what MLflow is told."""
    path = record / "run.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    if trace is not None:
        (record / "artifacts").mkdir(exist_ok=True)
        (record / "artifacts" / "traceback.txt").write_text(trace, encoding="utf-8")
    write_json(path, {**values, "status": status, "error": error, "ended": time.time()})


def code_revision() -> dict[str, str]:
    """Return the git commit that runs, and whether files differ from it."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    )
    return {"commit": commit.stdout.strip(), "changed": str(bool(changed.stdout.strip())).lower()}


def _start_sender(record: Path) -> subprocess.Popen[bytes]:
    """Start the process that sends the record to MLflow; it ends by itself when our end of its pipe closes."""
    started = json.loads((record / "run.json").read_text(encoding="utf-8"))["started"]
    command = [sys.executable, "-m", "tasks.tracking", str(record), repr(started)]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


def _end_sender(sender: subprocess.Popen[bytes]) -> None:
    assert sender.stdin is not None
    sender.stdin.close()
    try:
        sender.wait(timeout=60)
    except subprocess.TimeoutExpired:
        sender.kill()
        sys.stderr.write("MLflow takes too long, the record stays in .runs/: the next `publish` sends it\n")
