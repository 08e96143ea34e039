"""Make MLflow agree with dvc.lock: the last stage of the pipeline.

Sends the records that could not be sent while MLflow was down; creates a run for each stage whose outputs came from
DVC's run cache, so that nothing ran to record one; tags every stage's run and checkpoint with the digest of its output;
registers the checkpoints as models; writes the figures of all versions on the pipeline's run, where one line shows how
the chat model evolves. Doing it twice changes nothing.

Reads dvc.lock, .runs/ and every stage's output. Writes data/publish/outputs.csv: the digest of each output.
"""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from tasks.reading.rounds import NAME
from tasks.running.files import read_json
from tasks.running.fingerprint import digest_of_entry, params_of_entry
from tasks.running.params import Section, read_params
from tasks.running.places import DATA, RUNS, SCRATCH, entry_of, place_of, section_of
from tasks.running.processes import pipeline_id
from tasks.running.record import code_revision, read_run
from tasks.running.scratch import is_running
from tasks.running.stage import Stage, start
from tasks.steering import tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROMOTE = "promote"  # the stage that chooses the champion
START = "sft"  # evaluation of the model that the first round starts from


class Params(Section):
    """Parameters of `publish`."""

    registered_model_prefix: str = Field(
        min_length=1, description="a checkpoint is registered in MLflow under this prefix and its section's name"
    )


def locked_stages() -> dict[str, dict[str, Any]]:
    """Return each stage of dvc.lock except this one: its `fingerprint`, the digest of its `output`, its `params`."""
    from dvc.repo import Repo
    from ruamel.yaml import YAML

    lock = YAML(typ="safe").load(Path("dvc.lock").read_text(encoding="utf-8"))
    known = {stage.addressing for stage in Repo().index.stages}  # dvc.lock remembers stages that dvc.yaml no longer has
    stages = {}
    for name, entry in lock["stages"].items():
        if name == "publish" or name not in known:
            continue
        stages[name] = {
            "fingerprint": digest_of_entry(entry),
            "output": entry["outs"][0]["md5"],
            "params": params_of_entry(entry),
        }
    return stages


def send_waiting_records(own: Path) -> None:
    """Send the records that MLflow lacks, wholly or in part, and remove those it has; skip this stage's `own` record.

    No stage of the pipeline runs beside this one, which waits for all of them, but a study may. Any other record that
    still says RUNNING is of a stage that was killed together with its sender.
    """
    for run_file in sorted(RUNS.rglob("run.json")):
        record = run_file.parent
        if record == own:
            continue
        run = read_run(record)
        if run["status"] == "RUNNING":
            if is_running(record.relative_to(RUNS).parent):
                continue
            tracking.end_killed(record)
        if not tracking.fully_sent(record):
            tracking.send(record)
        if run["status"] == "FINISHED" or not (SCRATCH / record.relative_to(RUNS)).exists():
            tracking.forget(record)  # the run can't be resumed


def restored_run(client: MlflowClient, experiment_id: str, name: str, stage: Mapping[str, Any]) -> str:
    """Create the run of a stage whose outputs came from DVC's run cache: parameters and figures, no curves."""
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    parent = tracking.parent_run(client, experiment_id, pipeline_id(), now)
    tags = {
        "stage": name,
        "fingerprint": stage["fingerprint"],
        **tracking.tags_of(name),
        "restored_from_run_cache": "true",
        "mlflow.parentRunId": parent,
        "mlflow.source.git.commit": code_revision()["commit"],
    }
    run_id: str = client.create_run(experiment_id, now, tags, name).info.run_id
    figures = read_json(DATA / place_of(name) / "metrics.json")
    params = [Param(key, str(value)[: tracking.LONGEST_PARAM]) for key, value in sorted(stage["params"].items())]
    for first in range(0, len(params), tracking.PARAMS_PER_BATCH):
        client.log_batch(run_id, params=params[first : first + tracking.PARAMS_PER_BATCH])
    client.log_batch(run_id, metrics=[Metric(key, value, now, 0) for key, value in sorted(figures.items())])
    client.set_terminated(run_id, "FINISHED", now)
    return run_id


def register(client: MlflowClient, experiment_id: str, name: str, run_id: str, prefix: str, digest: str) -> None:
    """Register a stage's checkpoint: one registered model per section, one version per output digest.

    An alias leads to the version that dvc.lock has: models:/arriero-fine_tuning@rlhf-v1. The champion's leads to the
    version that the stage `promote` chose, models:/arriero-promote@champion, tagged with the reasons.
    """
    from mlflow.exceptions import MlflowException

    place = DATA / place_of(name)
    checkpoint = place / "champion" if name == PROMOTE else place
    if not (checkpoint / "config.json").exists():
        return
    model_id = tracking.model_of(client, experiment_id, run_id, {"path": str(checkpoint), "stage": name})
    client.set_logged_model_tags(model_id, {"digest": digest})
    registered = f"{prefix}-{section_of(name)}"
    try:
        client.get_registered_model(registered)
    except MlflowException:
        client.create_registered_model(registered)
    tags = {"digest": digest, "path": str(checkpoint)}
    query = " and ".join([f"name = '{registered}'", *(f"tags.{key} = '{value}'" for key, value in tags.items())])
    versions = client.search_model_versions(query) or [
        client.create_model_version(registered, f"models:/{model_id}", run_id, tags, model_id=model_id)
    ]
    client.set_registered_model_alias(registered, alias_of(name), versions[0].version)
    if name == PROMOTE:
        for key, value in reasons(read_json(place / "decision.json")).items():
            client.set_model_version_tag(registered, versions[0].version, key, value)


def reasons(decision: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags of the champion's version: which one it is, and how each challenge ended."""
    told = {
        each["challenger"]: f"{'promoted' if each['promoted'] else 'not promoted'}: "
        + "; ".join(rule["text"] for rule in each["rules"] if each["promoted"] or not rule["passed"])
        for each in decision["ladder"]
    }
    return {"champion": decision["champion"], **{f"challenge.{name}": text for name, text in told.items()}}


def alias_of(name: str) -> str:
    """Return the alias of a stage's checkpoint: `rlhf-v1`, as MLflow reserves `v1`; `current` if it runs once.

    The one that `promote` chose is the `champion`.
    """
    if name == PROMOTE:
        return "champion"
    entry = re.sub(r"[^\w-]", "_", entry_of(name))
    return f"rlhf-{entry}" if entry else "current"


def version_number(evaluation: str) -> int | None:
    """Return which version of the chat model an evaluation is of, by its name: sft is 0, v1 is 1; others are None."""
    found = NAME.fullmatch(evaluation)
    return int(found[1]) if found else 0 if evaluation == START else None


def write_evolution(client: MlflowClient, experiment_id: str, names: Iterable[str]) -> None:
    """Write the figures of each version's evaluation as `eval/*` on the pipeline's run, at the version's number.

    Controls and other evaluations are no versions. What the run has already is not written again.
    """
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    parent = tracking.parent_run(client, experiment_id, pipeline_id(), now)
    known = {
        (key, point.step): point.value
        for key in client.get_run(parent).data.metrics
        for point in sorted(client.get_metric_history(parent, key), key=lambda point: point.timestamp)
    }
    points = [
        Metric(f"eval/{key}", value, now, number)
        for name in names
        if section_of(name) == "evaluate" and (number := version_number(entry_of(name))) is not None
        for key, value in sorted(read_json(DATA / place_of(name) / "metrics.json").items())
    ]
    fresh = [point for point in points if known.get((point.key, point.step)) != point.value]
    for first in range(0, len(fresh), tracking.LINES_PER_BATCH):
        client.log_batch(parent, metrics=fresh[first : first + tracking.LINES_PER_BATCH])


def run(stage: Stage[Params]) -> dict[str, float]:
    """Bring MLflow up to date with dvc.lock."""
    from mlflow.exceptions import MlflowException

    stages = locked_stages()
    try:
        client, experiment_id = tracking.connect(read_params()["tracking"]["experiment"])
        send_waiting_records(stage.record)
        num_restored = 0
        for name, locked in sorted(stages.items()):
            identity = {"stage": name, "fingerprint": locked["fingerprint"]}
            run_id = tracking.find_run(client, experiment_id, identity, " and attributes.status = 'FINISHED'")
            if run_id is None:
                run_id = restored_run(client, experiment_id, name, locked)
                num_restored += 1
            client.set_tag(run_id, "output_digest", locked["output"])
            register(client, experiment_id, name, run_id, stage.params.registered_model_prefix, locked["output"])
        write_evolution(client, experiment_id, sorted(stages))
    except MlflowException as error:
        raise ValueError(
            f"MLflow does not answer ({tracking.without_password(str(error))}): start it or correct "
            "MLFLOW_TRACKING_URI, then `dvc repro publish`; every other stage is done and recorded in .runs/"
        ) from None
    stage.log({"restored_runs": num_restored}, step=0)
    with (stage.output / "outputs.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["stage", "output"])
        writer.writerows([name, locked["output"]] for name, locked in sorted(stages.items()))
    return {"stages": len(stages)}


if __name__ == "__main__":
    start(Params, run)
