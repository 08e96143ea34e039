"""Send the records of stage runs to MLflow.

A stage writes what happened into .runs/<stage>/<fingerprint>/ (tasks/running/record.py) and never talks to MLflow
itself: a server that is down, slow or restarted can't disturb training, and nothing is lost. This module reads a record
and makes MLflow agree with it; sending twice changes nothing. It has two callers:

- `python -m tasks.steering.tracking RECORD STARTED`, a process beside each running stage, so that curves grow while a
  model trains. It ends with the stage, which holds the other end of its standard input: when that closes, however the
  stage ended, the run gets its final status (a stage that has recorded none was killed).
- the stage `publish`, which sends what could not be sent before.

MLflow holds one parent run per pipeline run and below it one run per stage run, identified by the tags `stage`,
`fingerprint` and `begun` (when the stage was first started; a resumed run keeps it).
"""

from __future__ import annotations

import json
import logging
import os
import re
import select
import shutil
import signal
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.reading.rounds import NAME
from tasks.running.files import read_json, write_json
from tasks.running.places import SCRATCH, dashed, entry_of, section_of
from tasks.running.processes import bypass_proxy
from tasks.running.record import metric_lines, read_run

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient

STORE = Path("mlflow.db")
ARTIFACTS = Path("mlartifacts")
# Where MLflow's store notes whole addresses of artifacts: table and column.
PLACES_OF_ARTIFACTS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
SECONDS_BETWEEN_SENDS = 3.0
LINES_PER_BATCH = 1000  # MLflow's limit on metrics in one request
PARAMS_PER_BATCH = 100  # MLflow's limit on parameters in one request
LONGEST_PARAM = 6000  # MLflow's limit on the characters of a parameter's value
LONGEST_DIGEST = 36  # MLflow's limit on the characters of a dataset's digest


def connect(experiment: str) -> tuple[MlflowClient, str]:
    """Return a client and the id of the experiment, created if needed.

    MLFLOW_TRACKING_URI selects the server. Without it, runs go to mlflow.db and mlartifacts/ in the working directory.
    Raises MlflowException when the server does not answer, ValueError when the experiment was deleted there.
    """
    bypass_proxy()
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from filelock import FileLock
    from mlflow import MlflowClient, set_tracking_uri

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    configured = os.environ.get("MLFLOW_TRACKING_URI")
    uri = configured or default_store()
    artifacts = None if configured else ARTIFACTS.absolute().as_uri()
    SCRATCH.mkdir(exist_ok=True)
    # Whoever opens a new SQLite store first sets it up; two at once would corrupt it.
    with FileLock(SCRATCH / "mlflow.lock"):
        set_tracking_uri(uri)
        client = MlflowClient()
        found = client.get_experiment_by_name(experiment)
        if found and found.lifecycle_stage == "deleted":
            raise ValueError(
                f"MLflow's experiment `{experiment}` was deleted: bring it back with `mlflow experiments restore "
                f"--experiment-id {found.experiment_id}`, or name another one in params.yaml (`tracking.experiment`)"
            )
        if found and artifacts and found.artifact_location != artifacts:
            move_artifacts(found.artifact_location, artifacts)
        kind = {"mlflow.experimentKind": "custom_model_development"}  # MLflow's page then opens on training runs
        experiment_id = found.experiment_id if found else client.create_experiment(experiment, artifacts, kind)
    return client, experiment_id


def default_store() -> str:
    """Return the address of this folder's own MLflow store."""
    path = STORE.absolute()
    return f"sqlite:///{STORE if '?' in str(path) else path}"  # what follows a `?` would be options


def move_artifacts(before: str, now: str) -> None:
    """Let this folder's own store point to the artifacts beside it: MLflow notes whole paths, and the folder was moved.

    A copy would else write into the original.
    """
    import sqlite3

    with closing(sqlite3.connect(STORE)) as store, store:
        for table, column in PLACES_OF_ARTIFACTS:
            moved = f"{column} = ? || substr({column}, ?) WHERE substr({column} || '/', 1, ?) = ? || '/'"
            store.execute(
                f"UPDATE {table} SET {moved}",  # noqa: S608 - names of ours
                (now, len(before) + 1, len(before) + 1, before),
            )


def without_password(text: str) -> str:
    """Return an address, or an error's first line, without a password: MLflow quotes the server's whole address."""
    return re.sub(r"://[^/\s]*@", "://", text.splitlines()[0][:200])


def find_run(client: MlflowClient, experiment_id: str, tags: dict[str, str], condition: str = "") -> str | None:
    """Return the id of the newest run that has these tags and meets MLflow's search condition, or None."""
    query = " and ".join(f"tags.`{name}` = '{value}'" for name, value in sorted(tags.items())) + condition
    runs = client.search_runs([experiment_id], query, max_results=1, order_by=["attributes.start_time DESC"])
    return runs[0].info.run_id if runs else None


def parent_run(client: MlflowClient, experiment_id: str, pipeline: str, started_ms: int) -> str:
    """Return the id of the pipeline run's own MLflow run, created if needed (once, however many stages ask)."""
    from filelock import FileLock

    with FileLock(SCRATCH / "mlflow.lock"):
        tags = {"pipeline": pipeline, "level": "pipeline"}
        run_id = find_run(client, experiment_id, tags)
        if run_id is None:
            name = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started_ms / 1000))
            run_id = client.create_run(experiment_id, started_ms, tags, name).info.run_id
    return run_id


def send(record: Path) -> None:
    """Make MLflow agree with one record; it can be called any number of times.

    mlflow.json in the record remembers what was sent, so that only new data is sent.
    """
    from filelock import FileLock
    from mlflow.entities import Metric

    with FileLock(record.parent / f"{record.name}.lock"):
        run = read_run(record)
        client, experiment_id = connect(run["experiment"])
        state_file = record / "mlflow.json"
        state = read_json(state_file) if state_file.exists() else {}
        run_id, parent = _open_run(client, experiment_id, run, state)
        lines = list(metric_lines(record))
        points = [
            Metric(key, value, int(line["time"] * 1000), step)
            for line in lines[state.get("lines", 0) :]
            for name, value in line["metrics"].items()
            for key, step in _axes(name, line)
        ]
        known = {} if "lines" in state else _last_steps(client, run_id)
        metrics = [point for point in points if point.step > known.get(point.key, -1)]
        for first in range(0, len(metrics), LINES_PER_BATCH):
            client.log_batch(run_id, metrics=metrics[first : first + LINES_PER_BATCH])
        state = {"run_id": run_id, "lines": len(lines), "opened": run["started"], "ended": None}
        write_json(state_file, state)
        if run["status"] == "RUNNING":
            return
        _end_run(client, experiment_id, record, run, run_id, lines)
        _end_parent(client, experiment_id, parent, int(run["ended"] * 1000))
        write_json(state_file, {**state, "ended": run["ended"]})


def _axes(name: str, line: dict[str, Any]) -> list[tuple[str, int]]:
    """Return a metric's name and step, and another such pair against tokens if they are known."""
    axes = [(name, line["step"])]
    if line["tokens"] is not None:
        axes.append((f"by_tokens/{name}", line["tokens"]))
    return axes


def _last_steps(client: MlflowClient, run_id: str) -> dict[str, int]:
    """Return the last step that MLflow has of each metric; needed when our note of what was sent is lost."""
    keys = client.get_run(run_id).data.metrics
    return {key: max(point.step for point in client.get_metric_history(run_id, key)) for key in keys}


def tags_of(stage_name: str) -> dict[str, str]:
    """Return the tags that a stage's name gives its runs: where its code is, and the `round` that it is about.

    A round's stages have the same metrics in every round, so the tag tells their curves apart. Controls and other
    entries that are not called like rounds have none.
    """
    entry = entry_of(stage_name)
    is_round = NAME.fullmatch(entry) is not None
    return {"mlflow.source.name": f"tasks/{section_of(stage_name)}", **({"round": entry} if is_round else {})}


def _open_run(client: MlflowClient, experiment_id: str, run: dict[str, Any], state: dict[str, Any]) -> tuple[str, str]:
    """Find or create the stage's run and its parent; a resumed run moves to the pipeline run that resumed it."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Param

    parent = parent_run(client, experiment_id, run["pipeline"], int(run["started"] * 1000))
    identity = {"stage": run["stage"], "fingerprint": run["fingerprint"], "begun": str(run["begun"])}
    run_id: str | None = state.get("run_id")
    if run_id is None:
        tags = {
            **identity,
            **tags_of(run["stage"]),
            "mlflow.source.git.commit": run["code"]["commit"],
            "code_changed_since_commit": run["code"]["changed"],
        }
        run_id = find_run(client, experiment_id, identity)
        if run_id is None:
            run_id = str(client.create_run(experiment_id, int(run["begun"] * 1000), tags, run["stage"]).info.run_id)
        params = [Param(name, str(value)[:LONGEST_PARAM]) for name, value in sorted(run["params"].items())]
        for first in range(0, len(params), PARAMS_PER_BATCH):
            client.log_batch(run_id, params=params[first : first + PARAMS_PER_BATCH])
        inputs = [
            DatasetInput(
                Dataset(dataset["path"], dataset["digest"][:LONGEST_DIGEST], "dvc", dataset["path"]),
                [InputTag("mlflow.data.context", run["stage"])],
            )
            for dataset in run["datasets"]
        ]
        if inputs:
            client.log_inputs(run_id, inputs)
    if state.get("opened") != run["started"]:
        client.set_tag(run_id, "pipeline", run["pipeline"])
        client.set_tag(run_id, "mlflow.parentRunId", parent)
        if "error" in client.get_run(run_id).data.tags:
            client.delete_tag(run_id, "error")
        if run["status"] == "RUNNING":
            client.update_run(run_id, "RUNNING")
            client.update_run(parent, "RUNNING")
    return run_id, parent


def _end_run(
    client: MlflowClient,
    experiment_id: str,
    record: Path,
    run: dict[str, Any],
    run_id: str,
    lines: list[dict[str, Any]],
) -> None:
    """Send the figures, tables, files, checkpoint and status of a run that has ended."""
    from mlflow.entities import Metric

    ended = int(run["ended"] * 1000)
    last_step = max((line["step"] for line in lines), default=0)
    figures_file = record / "figures.json"
    figures = read_json(figures_file) if figures_file.exists() else {}
    model_id = None
    if run["status"] == "FINISHED" and (Path(run["output"]) / "config.json").exists():
        tags = {"path": run["output"], "stage": run["stage"], "fingerprint": run["fingerprint"], "step": str(last_step)}
        model_id = model_of(client, experiment_id, run_id, tags)
    logged = {name for line in lines for name in line["metrics"]}
    final = [Metric(key, value, ended, last_step, model_id) for key, value in figures.items() if key not in logged]
    for first in range(0, len(final), LINES_PER_BATCH):
        client.log_batch(run_id, metrics=final[first : first + LINES_PER_BATCH])
    shown = []
    for table in sorted((record / "tables").glob("*.csv")):  # log_table would append the rows again when resent
        shown.append({"path": f"tables/{table.stem}.json", "type": "table"})
        client.log_text(run_id, read_table(table).to_json(orient="split", index=False), shown[-1]["path"])
    if shown:
        client.set_tag(run_id, "mlflow.loggedArtifacts", json.dumps(shown))
    if (record / "artifacts").exists():
        client.log_artifacts(run_id, str(record / "artifacts"))
    if run["error"]:
        client.set_tag(run_id, "error", run["error"][:LONGEST_PARAM])
    client.set_terminated(run_id, run["status"], ended)


def model_of(client: MlflowClient, experiment_id: str, run_id: str, tags: dict[str, str]) -> str:
    """Return the id of a run's checkpoint in MLflow, created if needed: its files stay where they are."""
    import mlflow

    models = client.search_logged_models([experiment_id], f"source_run_id = '{run_id}'")
    if models:
        return str(models[0].model_id)
    name = dashed(tags["stage"]).replace(".", "-")  # MLflow's names of models have no dots, entries of ours may
    return str(mlflow.create_external_model(name, run_id, tags, experiment_id=experiment_id).model_id)


def read_table(path: Path) -> pd.DataFrame:
    """Return a table of a record; only empty cells are missing values, as texts may be `None` or `NA`."""
    import pandas as pd

    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def _end_parent(client: MlflowClient, experiment_id: str, parent: str, ended_ms: int) -> None:
    """End the pipeline's run when none of its stages is running any more, with the worst of their statuses."""
    stages = client.search_runs([experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    states = {stage.info.status for stage in stages}
    if "RUNNING" not in states:
        client.set_terminated(parent, next(s for s in ("FAILED", "KILLED", "FINISHED") if s in states), ended_ms)


def end_killed(record: Path) -> None:
    """Record that the stage was killed: it died without closing its record."""
    run = read_run(record)
    write_json(record / "run.json", {**run, "status": "KILLED", "error": "killed", "ended": time.time()})


def forget(record: Path) -> None:
    """Remove a record that MLflow has completely."""
    shutil.rmtree(record)
    (record.parent / f"{record.name}.lock").unlink(missing_ok=True)


def fully_sent(record: Path) -> bool:
    """Return whether MLflow has all of a record, including its end."""
    state_file = record / "mlflow.json"
    if not state_file.exists():
        return False
    run = read_run(record)
    state = read_json(state_file)
    return bool(run["status"] != "RUNNING" and state["ended"] == run["ended"])


def follow(record: Path, started: float) -> None:
    """Send the record of the stage that started at `started`, repeatedly until it ends, then once more."""
    from mlflow.exceptions import MlflowException

    ended = False
    while not ended:
        readable, _, _ = select.select([sys.stdin], [], [], SECONDS_BETWEEN_SENDS)
        ended = bool(readable) and os.read(sys.stdin.fileno(), 1) == b""
        run = read_run(record)
        if run["started"] != started:
            return  # the stage died and was restarted: the newer run has its own sender
        if ended and run["status"] == "RUNNING":
            end_killed(record)
        try:
            send(record)
        except (MlflowException, ValueError) as error:
            if ended:
                sys.stderr.write(
                    f"MLflow does not have the record of {run['stage']}, it stays in {record}: "
                    f"the next `publish` sends it, or now `dvc repro -f -s publish` ({without_password(str(error))})\n"
                )


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the stage decides; this process ends when the stage has
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    follow(Path(sys.argv[1]), float(sys.argv[2]))
