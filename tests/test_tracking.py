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

from tasks import publish, tracking
from tasks.stage import fingerprint, metric_lines


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
    assert grow.data.params == {"seed": "1", "grow.num_steps": "3", "grow.seconds": "0.0", "grow.fail_at": "None"}
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
    stage_process = next(p for p in processes_in(workspace) if p.cmdline()[-2:] == ["-m", "grow"])
    stage_process.send_signal(signal.SIGKILL)
    dvc.wait(timeout=30)
    wait_for(lambda: not processes_in(workspace))
    assert runs()["grow"][0].info.status == "KILLED"
    assert repro("grow").returncode == 0
    (grow,) = runs()["grow"]
    assert grow.info.status == "FINISHED"
    assert [step for step, _ in history(grow, "train/loss")] == list(range(1, 13))


def test_nothing_is_lost_while_the_server_is_away(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    result = repro()
    assert "MLflow does not answer" in result.stderr
    assert "every other stage is done and recorded in .runs/" in result.stderr
    assert "`dvc repro publish` sends it later" in result.stderr
    assert Path("data/shrink/shrunk.txt").exists()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert repro().returncode == 0
    found = runs()
    assert found["grow"][0].info.status == found["shrink"][0].info.status == "FINISHED"
    assert history(found["grow"][0], "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert not list(Path(".runs/grow").glob("*/run.json"))


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
    assert history(grow, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert os.environ.get("MLFLOW_DISABLE_TELEMETRY") == "true"
