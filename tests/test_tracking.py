from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import repro
from test_stage import processes_in, set_value, wait_for

from tasks import publish
from tasks.running import record as record_module
from tasks.running.fingerprint import fingerprint
from tasks.running.record import metric_lines
from tasks.steering import tracking


def runs() -> dict[str, list[Any]]:
    """All MLflow runs of the workspace by their stage, oldest first."""
    client, experiment_id = tracking.connect("test")
    found: dict[str, list[Any]] = {}
    for run in client.search_runs([experiment_id], order_by=["attributes.start_time ASC"]):
        found.setdefault(run.data.tags.get("stage", "pipeline"), []).append(run)
    return found


def history(run: Any, metric: str) -> list[tuple[int, float]]:
    client, _ = tracking.connect("test")
    return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, metric)]


def test_a_pipeline_is_recorded_whole(workspace: Path) -> None:
    assert repro().returncode == 0
    found = runs()
    assert {name: len(group) for name, group in found.items()} == {"pipeline": 1, "grow": 1, "shrink": 1, "publish": 1}
    assert {run.info.status for group in found.values() for run in group} == {"FINISHED"}
    (parent,), (grow,), (shrink,) = found["pipeline"], found["grow"], found["shrink"]
    assert grow.data.tags["mlflow.parentRunId"] == shrink.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert grow.data.params == {
        "machine.num_ranks": "1", "seed": "1", "grow.num_steps": "3", "grow.seconds": "0.0", "grow.fail_at": "None",
    }  # fmt: skip
    assert history(grow, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert history(grow, "by_tokens/train/loss") == [(10, 1.0), (20, 0.5), (30, 1 / 3)]
    assert shrink.data.metrics["size"] == 1.5
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert grow.data.tags["mlflow.source.git.commit"] == commit
    lock = publish.locked_stages()
    assert grow.data.tags["output_digest"] == lock["grow"]["output"]
    assert grow.data.tags["fingerprint"] == lock["grow"]["fingerprint"] == fingerprint("grow")[0]
    (dataset,) = [item.dataset for item in shrink.inputs.dataset_inputs]
    assert (dataset.name, dataset.digest) == ("data/grow", lock["grow"]["output"])
    client, _ = tracking.connect("test")
    assert {file.path for file in client.list_artifacts(grow.info.run_id)} == {"note.txt", "tables"}


def test_a_failed_stage_is_failed_and_its_pipeline_too(workspace: Path) -> None:
    set_value("fail_at: null", "fail_at: 2")
    assert repro().returncode != 0
    found = runs()
    assert found["grow"][0].info.status == found["pipeline"][0].info.status == "FAILED"
    assert "step 2 was told to fail" in found["grow"][0].data.tags["error"]


def test_a_killed_stage_is_killed_and_goes_on_as_the_same_run(workspace: Path) -> None:
    set_value("seconds: 0.0", "seconds: 0.3")
    set_value("num_steps: 3", "num_steps: 12")
    dvc = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "grow"])
    wait_for(lambda: any(len(list(metric_lines(path))) >= 3 for path in Path(".runs/grow").glob("*")))
    stage_process = next(p for p in processes_in(workspace) if p.info["cmdline"][-2:] == ["-m", "tasks.grow"])
    stage_process.send_signal(signal.SIGKILL)
    dvc.wait(timeout=180)
    wait_for(lambda: not processes_in(workspace))
    assert runs()["grow"][0].info.status == "KILLED"
    assert repro("grow").returncode == 0
    (grow,) = runs()["grow"]
    assert grow.info.status == "FINISHED"
    assert [step for step, _ in history(grow, "train/loss")] == list(range(1, 13))


@pytest.mark.slow
def test_nothing_is_lost_while_the_server_is_away(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    result = repro()
    assert "MLflow does not answer" in result.stderr
    assert "every other stage is done and recorded in .runs/" in result.stderr
    assert "the next `publish` sends it, or now `dvc repro -f -s publish`" in result.stderr
    assert Path("data/shrink/shrunk.txt").exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert repro().returncode == 0
    found = runs()
    assert found["grow"][0].info.status == found["shrink"][0].info.status == "FINISHED"
    assert history(found["grow"][0], "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert not list(Path(".runs/grow").glob("*/run.json"))


@pytest.mark.slow
def test_outputs_from_the_run_cache_get_a_run(workspace: Path) -> None:
    assert repro("shrink").returncode == 0
    for file in Path().glob("mlflow.db*"):
        file.unlink()
    assert repro().returncode == 0  # nothing but publish runs
    (grow,) = runs()["grow"]
    assert grow.data.tags["restored_from_run_cache"] == "true"
    assert grow.data.metrics == {"size": 3.0}
    assert grow.data.params["grow.num_steps"] == "3"
    before = {name: len(group) for name, group in runs().items()}
    assert repro("-f", "-s", "publish").returncode == 0
    after = {name: len(group) for name, group in runs().items()}
    assert after == {**before, "publish": 2, "pipeline": 2}


def test_sending_twice_changes_nothing(workspace: Path) -> None:
    assert repro("grow").returncode == 0
    (record,) = (path.parent for path in Path(".runs/grow").glob("*/run.json"))
    assert tracking.fully_sent(record)
    state = json.loads((record / "mlflow.json").read_text())
    tracking.send(record)
    (record / "mlflow.json").unlink()
    assert not tracking.fully_sent(record)
    tracking.send(record)
    assert json.loads((record / "mlflow.json").read_text()) == state
    (grow,) = runs()["grow"]
    client, _ = tracking.connect("test")
    table = client.download_artifacts(grow.info.run_id, "tables/steps.json", str(workspace))
    assert json.loads(Path(table).read_text()) == {"columns": ["step", "loss"], "data": [[1, 1.0]]}
    assert history(grow, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert os.environ.get("MLFLOW_DISABLE_TELEMETRY") == "true"


def open_record(stage: str, pipeline: str) -> Path:
    """Open a record as a stage does; its parent process is this test."""
    record = Path(".runs") / stage / "0123456789abcdef"
    header = {
        "stage": stage,
        "fingerprint": record.name,
        "pipeline": pipeline,
        "experiment": "test",
        "params": {"seed": 1},
        "datasets": [],
        "code": {"commit": "c0ffee", "changed": "false"},
        "output": f"data/{stage}",
    }
    record_module.open_record(record, header)
    return record


def test_a_pipeline_whose_stage_failed_has_failed_whatever_ends_later(workspace: Path) -> None:
    first, second = open_record("first", "flow"), open_record("second", "flow")
    for record in (first, second):
        tracking.send(record)
    record_module.close_record(first, "FAILED", "ValueError: no")
    tracking.send(first)
    third = open_record("third", "flow")  # starts when the first has failed already
    tracking.send(third)
    assert runs()["pipeline"][0].info.status == "RUNNING"
    for record in (second, third):
        record_module.close_record(record, "FINISHED")
        tracking.send(record)
    assert runs()["pipeline"][0].info.status == "FAILED"


def test_a_stage_that_succeeds_when_tried_again_leaves_no_trace_of_failure(workspace: Path) -> None:
    for pipeline in ("first", "second"):  # it fails in the first, and again in the second, which tries it once more
        record = open_record("grow", pipeline)
        tracking.send(record)
        record_module.close_record(record, "FAILED", "ValueError: no")
        tracking.send(record)
    record = open_record("grow", "second")
    tracking.send(record)
    record_module.close_record(record, "FINISHED")
    tracking.send(record)
    (grow,), parents = runs()["grow"], runs()["pipeline"]
    assert grow.info.status == "FINISHED"
    assert "error" not in grow.data.tags
    assert {run.data.tags["pipeline"]: run.info.status for run in parents} == {"first": "FAILED", "second": "FINISHED"}
    (second,) = [run.info.run_id for run in parents if run.data.tags["pipeline"] == "second"]
    assert grow.data.tags["mlflow.parentRunId"] == second


def test_what_a_server_that_stopped_halfway_did_not_get_is_sent_again(workspace: Path) -> None:
    record = open_record("grow", "flow")
    run = json.loads((record / "run.json").read_text())
    client, experiment_id = tracking.connect("test")
    identity = {name: str(run[name]) for name in ("stage", "fingerprint", "begun")}
    client.create_run(experiment_id, tags=identity)  # and then the server stops
    tracking.send(record)
    (grow,) = runs()["grow"]
    assert grow.data.params == {"seed": "1"}


def test_a_stage_that_dvc_yaml_no_longer_has_is_not_published(workspace: Path) -> None:
    entry = "{cmd: x, outs: [{path: data/NAME, md5: 0123.dir}]}"
    lines = [f"  {name}: {entry.replace('NAME', name)}" for name in ("gone", "grow", "publish")]
    Path("dvc.lock").write_text("\n".join(["schema: '2.0'", "stages:", *lines]))
    Path("data/gone").mkdir(parents=True)
    Path("data/gone/metrics.json").write_text("{}")
    assert list(publish.locked_stages()) == ["grow"]


@pytest.mark.slow
def test_a_stage_that_runs_again_after_publish_gets_a_run_of_its_own(workspace: Path) -> None:
    assert repro().returncode == 0
    assert repro("-f", "-s", "grow").returncode == 0
    assert [run.info.status for run in runs()["grow"]] == ["FINISHED", "FINISHED"]


@pytest.mark.slow
def test_publish_runs_also_when_every_other_stage_comes_from_the_run_cache(workspace: Path) -> None:
    assert repro().returncode == 0
    set_value("factor: 0.5", "factor: 0.25")
    assert repro().returncode == 0
    for file in Path().glob("mlflow.db*"):
        file.unlink()
    set_value("factor: 0.25", "factor: 0.5")
    assert repro().returncode == 0
    assert runs()["shrink"][0].data.tags["restored_from_run_cache"] == "true"


def status_in(run_file: Path) -> str | None:
    try:
        status: str = json.loads(run_file.read_text())["status"]
    except FileNotFoundError:  # a finished record is begun anew
        return None
    return status


@pytest.mark.slow
def test_publish_ends_runs_of_dead_stages_and_ties_outputs_to_runs_that_made_them(workspace: Path) -> None:
    set_value("seconds: 0.0", "seconds: 1.0")
    assert repro("shrink").returncode == 0
    dvc = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "-f", "-s", "grow"], start_new_session=True)
    (run_file,) = Path(".runs/grow").glob("*/run.json")
    wait_for(lambda: status_in(run_file) == "RUNNING")
    os.killpg(dvc.pid, signal.SIGKILL)  # as when the machine stops: nobody is left to tell MLflow
    dvc.wait()
    wait_for(lambda: not processes_in(workspace))
    assert repro().returncode == 0  # the outputs come back from the run cache
    made, killed = runs()["grow"]
    assert (made.info.status, killed.info.status) == ("FINISHED", "KILLED")
    assert made.data.tags["output_digest"] == publish.locked_stages()["grow"]["output"]
    assert "output_digest" not in killed.data.tags


@pytest.mark.slow
def test_messages_hold_no_password(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:s3cret@127.0.0.1:9")
    assert repro("grow").returncode == 0
    result = repro("publish")
    assert "(API request to http://127.0.0.1:9/" in result.stderr
    assert "s3cret" not in result.stderr
    assert not any("s3cret" in path.read_text() for path in Path(".runs").rglob("*") if path.is_file())
