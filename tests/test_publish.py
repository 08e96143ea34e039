"""What `publish` makes of versions, controls and evaluations, on a real MLflow store and with real DVC."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import repro
from test_tracking import history, runs

from tasks import publish
from tasks.running.files import write_json
from tasks.steering import tracking

# What a round of the pipeline writes, as far as `publish` reads it: a checkpoint's config.json, and figures.
MAKE = """\
import sys
from pathlib import Path
from tasks.running.files import write_json

place, value = Path(sys.argv[1]), float(sys.argv[2])
place.mkdir(parents=True)
write_json(place / "metrics.json", {"safety/violations": value, "well_formed": 1.0})
if place.parts[1] == "promote":
    rule = {"rule": "wins", "passed": True, "text": "it wins"}
    passed = {"challenger": "v1", "champion": "sft", "promoted": True, "rules": [rule]}
    rules = [rule, {**rule, "passed": False, "text": "it refuses"}]
    failed = {**passed, "challenger": "v2", "promoted": False, "rules": rules}
    write_json(place / "decision.json", {"champion": "v1", "ladder": [passed, failed]})
    write_json(place / "champion" / "config.json", {"model_type": "llama"})
elif place.parts[1] != "evaluate":
    write_json(place / "config.json", {"model_type": "llama", "value": value})
"""
PIPELINE = """\
stages:
  sft:
    cmd: PYTHON make.py data/sft 0.5
    outs: [data/sft]
  fine_tuning:
    foreach: {v1: 0.25, v2: 0.125}
    do:
      cmd: PYTHON make.py data/fine_tuning/${key} ${item}
      outs: ["data/fine_tuning/${key}"]
  controls:
    foreach: {v1_random: 0.75, v1.again: 0.875}
    do:
      cmd: PYTHON make.py data/controls/${key} ${item}
      outs: ["data/controls/${key}"]
  evaluate:
    foreach: {sft: 0.5, v1: 0.25, v2: 0.125, v1_random: 0.75}
    do:
      cmd: PYTHON make.py data/evaluate/${key} ${item}
      outs: ["data/evaluate/${key}"]
  promote:
    cmd: PYTHON make.py data/promote 1
    outs: [data/promote]
  publish:
    cmd: exec PYTHON -m tasks.publish
    deps: [data/sft, data/fine_tuning, data/controls, data/evaluate, data/promote]
    params: [publish]
    outs:
    - data/publish:
        persist: true
"""


@pytest.fixture
def rounds(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline of two rounds and two controls, published."""
    monkeypatch.setenv("ARRIERO_PIPELINE", "flow")
    (workspace / "dvc.yaml").write_text(PIPELINE.replace("PYTHON", sys.executable))
    (workspace / "make.py").write_text(MAKE)
    result = repro()
    assert result.returncode == 0, result.stderr
    return workspace


def evolution(metric: str) -> list[tuple[int, float]]:
    (parent,) = [run for run in runs()["pipeline"] if run.data.tags["pipeline"] == "flow"]
    return history(parent, metric)


@pytest.mark.slow
def test_versions_are_told_apart_and_seen_as_one_line(rounds: Path) -> None:
    found = {name: run for name, (run,) in runs().items()}
    for entry in ("v1", "v2"):
        assert found[f"fine_tuning@{entry}"].data.tags["round"] == entry
        assert found[f"evaluate@{entry}"].data.tags["round"] == entry
        assert found[f"fine_tuning@{entry}"].data.tags["mlflow.source.name"] == "tasks/fine_tuning"
    assert set(found["fine_tuning@v1"].data.metrics) == set(found["fine_tuning@v2"].data.metrics)
    assert not any("round" in found[name].data.tags for name in ("sft", "evaluate@sft", "controls@v1_random"))
    assert evolution("eval/safety/violations") == [(0, 0.5), (1, 0.25), (2, 0.125)]
    assert evolution("eval/well_formed") == [(0, 1.0), (1, 1.0), (2, 1.0)]

    client, _ = tracking.connect("test")
    names = {"toy-sft", "toy-fine_tuning", "toy-controls", "toy-promote"}
    assert {model.name for model in client.search_registered_models()} == names
    lock = publish.locked_stages()
    for name, registered, alias in (
        ("sft", "toy-sft", "current"),
        ("fine_tuning@v1", "toy-fine_tuning", "rlhf-v1"),
        ("fine_tuning@v2", "toy-fine_tuning", "rlhf-v2"),
        ("controls@v1_random", "toy-controls", "rlhf-v1_random"),
        ("controls@v1.again", "toy-controls", "rlhf-v1_again"),
    ):
        version = client.get_model_version_by_alias(registered, alias)
        assert version.tags == {"digest": lock[name]["output"], "path": f"data/{name.replace('@', '/')}"}
        assert version.run_id == found[name].info.run_id


@pytest.mark.slow
def test_the_champions_alias_leads_to_it_with_the_reasons(rounds: Path) -> None:
    client, _ = tracking.connect("test")
    version = client.get_model_version_by_alias("toy-promote", "champion")
    assert version.tags == {
        "digest": publish.locked_stages()["promote"]["output"],
        "path": "data/promote/champion",
        "champion": "v1",
        "challenge.v1": "promoted: it wins",
        "challenge.v2": "not promoted: it refuses",
    }


@pytest.mark.slow
def test_publishing_again_adds_only_what_has_changed(rounds: Path) -> None:
    client, _ = tracking.connect("test")
    before = {(each.name, each.version): each.tags for each in client.search_model_versions()}
    assert repro("-f", "-s", "publish").returncode == 0
    assert evolution("eval/safety/violations") == [(0, 0.5), (1, 0.25), (2, 0.125)]
    assert {(each.name, each.version): each.tags for each in client.search_model_versions()} == before

    text = Path("dvc.yaml").read_text()
    Path("dvc.yaml").write_text(text.replace("v2: 0.125", "v2: 0.0625"))
    assert repro().returncode == 0
    assert evolution("eval/safety/violations") == [(0, 0.5), (1, 0.25), (2, 0.125), (2, 0.0625)]
    assert evolution("eval/well_formed") == [(0, 1.0), (1, 1.0), (2, 1.0)]
    assert len(client.search_model_versions()) == len(before) + 1
    newest = client.get_model_version_by_alias("toy-fine_tuning", "rlhf-v2")
    assert newest.tags["digest"] == publish.locked_stages()["fine_tuning@v2"]["output"]

    Path("dvc.yaml").write_text(text)  # the outputs come back from the run cache, and the alias with them
    assert repro().returncode == 0
    assert evolution("eval/safety/violations")[-1] == (2, 0.125)
    newest = client.get_model_version_by_alias("toy-fine_tuning", "rlhf-v2")
    assert before["toy-fine_tuning", newest.version] == newest.tags


def test_what_evaluations_are_of_versions() -> None:
    names = ("sft", "v1", "v12", "v1_random", "v0", "base", "")
    assert [publish.version_number(name) for name in names] == [0, 1, 12, None, None, None, None]


def test_the_last_figure_of_a_version_counts(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARRIERO_PIPELINE", "flow")
    client, experiment_id = tracking.connect("test")
    figures = Path("data/evaluate/v1/metrics.json")
    figures.parent.mkdir(parents=True)
    for value in (1.0, 0.5, 0.5, 1.0, 1.0):  # a re-evaluated version may return to an earlier figure
        write_json(figures, {"well_formed": value})
        publish.write_evolution(client, experiment_id, ["evaluate@v1", "fine_tuning@v1"])
    assert evolution("eval/well_formed") == [(1, 1.0), (1, 0.5), (1, 1.0)]
