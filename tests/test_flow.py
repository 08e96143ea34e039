from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from conftest import TOY_DVC, migrated_prefect, repro
from dvc.repo import Repo
from ruamel.yaml import YAML
from test_stage import processes_in, set_value, wait_for

from flows import graph
from flows.graph import find_stale, read_graph
from flows.servers import free_port
from flows.summary import format_number, main_figures, summarize
from tasks.running.record import metric_lines
from tasks.steering.reproduce import Seats


@pytest.fixture(autouse=True)
def prefect_home(tmp_path: Path) -> None:
    shutil.copytree(migrated_prefect(), tmp_path / "prefect")


def recipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.recipe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def lock() -> object:
    return YAML(typ="safe").load(Path("dvc.lock").read_text())


def test_a_null_where_dvc_needs_a_path_is_told(workspace: Path) -> None:
    Path("dvc.yaml").write_text(
        Path("dvc.yaml").read_text().replace("- data/grow\n    params", '- "${grow.fail_at}"\n    params')
    )
    with pytest.raises(ValueError, match=r"`grow.fail_at` is null, and dvc.yaml uses it: data/seeds/none stands for "):
        read_graph()


def test_the_graph_is_dvcs(workspace: Path) -> None:
    nodes = read_graph()
    assert [(node.name, node.after) for node in nodes] == [
        ("grow", ()),
        ("shrink", ("grow",)),
        ("publish", ("shrink",)),
    ]
    assert [node.name for node in read_graph(["shrink"])] == ["grow", "shrink"]
    assert nodes[0].meta == {"figures": ["size"]}
    assert find_stale(nodes) == ["grow", "shrink", "publish"]


def test_an_unknown_target_names_the_near_match(workspace: Path) -> None:
    with pytest.raises(ValueError, match=r"dvc.yaml has no stage `shrnk`; did you mean `shrink`\?"):
        read_graph(["shrnk"])


def test_a_group_of_stages_is_a_target(workspace: Path) -> None:
    text = Path("dvc.yaml").read_text() + "  again:\n    foreach: {v1: 1, v2: 2}\n    do:\n      cmd: echo ${key}\n"
    Path("dvc.yaml").write_text(text)
    assert [node.name for node in read_graph(["again"])] == ["again@v1", "again@v2"]


def test_data_that_dvc_tracks_is_no_stage(workspace: Path) -> None:
    Path("labels.csv").write_text("a\n")
    subprocess.run([sys.executable, "-m", "dvc", "add", "-q", "labels.csv"], check=True)
    text = Path("dvc.yaml").read_text().replace("    - tasks/grow.py\n", "    - tasks/grow.py\n    - labels.csv\n")
    Path("dvc.yaml").write_text(text)
    Path("labels.csv").write_text("b\n")
    nodes = read_graph()
    assert [node.name for node in nodes] == ["grow", "shrink", "publish"]
    assert nodes[0].after == ()
    assert find_stale(nodes) == ["grow", "shrink", "publish"]


def test_an_entry_of_a_group_may_hold_several_values(workspace: Path) -> None:
    Path("params.yaml").write_text(
        Path("params.yaml").read_text() + "rounds:\n  v1: {newest: data/shrink, again: data/grow}\n"
    )
    text = Path("dvc.yaml").read_text() + (
        "  responses:\n    foreach: ${rounds}\n    do:\n      cmd: echo ${key}\n      deps: ['${item.newest}']\n"
        "      outs: ['data/responses/${key}']\n"
        "  reward:\n    foreach: ${rounds}\n    do:\n      cmd: echo ${key}\n"
        "      deps: ['data/responses/${key}', '${item.again}']\n"
    )
    Path("dvc.yaml").write_text(text)
    nodes = {node.name: node for node in read_graph(["reward"])}
    assert list(nodes) == ["grow", "shrink", "responses@v1", "reward@v1"]
    assert nodes["reward@v1"].after == ("grow", "responses@v1")
    assert nodes["reward@v1"].address == "reward@v1"


def test_a_target_may_come_with_the_values_that_are_set(workspace: Path) -> None:
    Path("params.yaml").write_text(Path("params.yaml").read_text() + "rounds: {}\n")
    with Path("dvc.yaml").open("w") as file:
        file.write(TOY_DVC.partition("  shrink:\n")[0])
        file.write(
            f"  shrink:\n    foreach: ${{rounds}}\n    do:\n      cmd: exec {sys.executable} -m tasks.shrink ${{key}}\n"
            "      deps: [data/grow]\n      params: [seed, shrink]\n      outs: ['data/shrink/${key}']\n"
        )
    done = recipe("shrink", "--set", "rounds={v1: 1}")
    assert done.returncode == 0, done.stderr
    assert Path("data/shrink/v1/shrunk.txt").read_text() == "1.5\n"


STUDY = """\
stages:
  scaling:
    cmd: cp data/shrink/shrunk.txt study.txt
    wdir: ..
    deps:
    - data/shrink
    params:
    - grow
    outs:
    - study.txt
"""


@pytest.mark.slow
def test_a_study_runs_by_name_only(workspace: Path) -> None:
    Path("studies").mkdir()
    Path("studies/dvc.yaml").write_text(STUDY)
    assert [node.name for node in read_graph()] == ["grow", "shrink", "publish"]
    nodes = read_graph(["scaling"])
    assert [node.name for node in nodes] == ["grow", "shrink", "scaling"]
    assert (nodes[-1].address, nodes[-1].after) == ("studies/dvc.yaml:scaling", ("shrink",))
    assert repro().returncode == 0
    assert not Path("study.txt").exists()
    assert find_stale(nodes) == ["scaling"]
    assert repro("studies/dvc.yaml").returncode == 0
    assert Path("study.txt").read_text() == "1.5\n"
    assert find_stale(nodes) == []


def test_a_study_that_is_named_as_a_stage_is_refused(workspace: Path) -> None:
    Path("studies").mkdir()
    Path("studies/dvc.yaml").write_text("stages:\n  grow:\n    cmd: echo\n")
    with pytest.raises(ValueError, match=r"`grow` is the name of two stages, in dvc.yaml and in a study: rename one"):
        read_graph()


def test_a_dvc_file_that_cannot_be_read_is_explained(workspace: Path) -> None:
    Path("dvc.yaml").write_text("stages: [\n")
    with pytest.raises(ValueError, match=r"dvc.yaml can't be read"):
        read_graph()
    Path("dvc.yaml").unlink()
    with pytest.raises(ValueError, match=r"dvc.yaml has no stages, or is missing"):
        read_graph()


def test_a_change_makes_stale_what_depends_on_it(workspace: Path) -> None:
    assert repro().returncode == 0
    assert find_stale(read_graph()) == []
    set_value("factor: 0.5", "factor: 0.25")
    assert find_stale(read_graph()) == ["shrink", "publish"]
    code = Path("tasks/grow.py")
    code.write_text(code.read_text() + "# changed\n")
    assert find_stale(read_graph(["grow"])) == ["grow"]


def test_dvc_at_work_elsewhere_is_explained(workspace: Path) -> None:
    nodes = read_graph()
    with Repo().lock, pytest.raises(ValueError, match=r"DVC can't tell what is out of date: Unable to acquire lock"):
        find_stale(nodes)


def test_the_summary_names_outcomes_and_main_figures(workspace: Path) -> None:
    nodes = read_graph(["shrink"])
    Path("data/grow").mkdir(parents=True)
    Path("data/grow/metrics.json").write_text(json.dumps({"size": 12345, "other": 1}))
    assert main_figures(nodes[0]) == "size 12,345"
    outcomes = {"grow": "ran in 3 s", "shrink": "up to date"}
    text = summarize(nodes, outcomes, 4.2, waiting=None)
    assert "The pipeline is up to date (4 s)." in text
    assert "  grow    ran in 3 s    size 12,345\n  shrink  up to date\n" in text
    assert "make ui" in text
    assert format_number(0.123456) == "0.1235"
    waiting = summarize(nodes, outcomes, 4.2, waiting="waiting for labels, put them at data/labels")
    assert "The pipeline is waiting (4 s)." in waiting
    assert waiting.endswith("\nwaiting for labels, put them at data/labels\n")


@pytest.mark.slow
def test_the_flow_gives_what_dvc_gives_and_a_second_run_does_nothing(workspace: Path) -> None:
    first = recipe()
    assert first.returncode == 0, first.stderr
    assert "The pipeline is up to date" in first.stdout
    by_flow = lock()
    second = recipe()
    assert "up to date" in second.stdout
    assert "ran in" not in second.stdout
    third = recipe("shrink", "--set", "shrink.factor=0.25")
    assert third.returncode == 0, third.stderr
    assert " grow    up to date" in third.stdout
    assert " shrink  ran in" in third.stdout
    assert YAML(typ="safe").load(Path("params.yaml").read_text())["shrink"]["factor"] == 0.25
    fourth = recipe("shrink", "--set", "shrink.factor=0.5")
    assert " shrink  restored" in fourth.stdout
    subprocess.run(["git", "checkout", "-q", "params.yaml"], check=True)
    Path("dvc.lock").unlink()
    subprocess.run(["rm", "-rf", "data"], check=True)
    assert repro("--no-run-cache").returncode == 0
    assert lock() == by_flow


@pytest.mark.slow
def test_a_failed_stage_fails_the_flow_with_its_own_message(workspace: Path) -> None:
    result = recipe("--set", "grow.fail_at=2")
    assert result.returncode == 1
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line == "stage `grow` failed: ValueError: grow.fail_at: step 2 was told to fail"
    assert not Path("data/shrink").exists()
    result = recipe("--set", "grow.num_steps=0")  # the record of the failure before is still there
    assert "`grow.num_steps` is 0: Input should be greater than 0" in result.stderr
    assert "told to fail" not in result.stderr
    Path("data/shrink").mkdir(parents=True)  # a result of before
    wrong = recipe("--set", "grow.fail_at=null", "--set", "shrink.factor=2")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().endswith("`shrink.factor` is 2: Input should be less than 1 (share that stays)")
    assert Path("data/shrink").exists()
    assert not Path("data/grow").exists()
    assert recipe("--set", "grow.fial_at=2").stderr.startswith("overrides: `grow.fial_at` is not a parameter")


LABEL = """\
from pathlib import Path
from pydantic import Field
from tasks.running.params import Section
from tasks.running.stage import Stage, Waiting, start


class Params(Section):
    file: str = Field(description="what people write")


def run(stage: Stage[Params]) -> dict[str, float]:
    path = Path("labels") / stage.params.file
    if not path.exists():
        raise Waiting(f"waiting for labels of {stage.name.partition('@')[2]}, put them at {path}")
    (stage.output / "labels.txt").write_text(path.read_text())
    return {"labels": 1}


if __name__ == "__main__":
    start(Params, run)
"""

LABEL_STAGE = f"""\
  label:
    foreach: {{v1: 1}}
    do:
      cmd: exec {sys.executable} -m tasks.label ${{key}}
      deps:
      - data/grow
      - labels
      params:
      - label
      outs:
      - data/label/${{key}}
  learn:
    cmd: mkdir -p data/learn && cp data/label/v1/labels.txt data/learn/
    deps:
    - data/label/v1
    outs:
    - data/learn
"""


def runs_of(query: str) -> list[Any]:
    from mlflow import MlflowClient

    # By its whole path: MLflow keeps a store open by its address, and the next test has another folder.
    client = MlflowClient(f"sqlite:///{Path('mlflow.db').absolute()}")
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id], query, order_by=["start_time ASC"]))


def pipeline_runs() -> list[str]:
    return [run.info.status for run in runs_of("tags.level = 'pipeline'")]


def stage_runs() -> list[tuple[str, str, str]]:
    """Each stage's run: its name, its status, and its error if it has one."""
    return [(run.info.run_name, run.info.status, run.data.tags.get("error", "")) for run in runs_of("tags.stage != ''")]


@pytest.mark.slow
def test_a_stage_that_waits_for_people_ends_its_part_of_the_flow(workspace: Path) -> None:
    Path("labels").mkdir()
    Path("labels/README.md").write_text("Labels of people.\n")
    Path("tasks/label.py").write_text(LABEL)
    Path("tasks/learn.py").write_text("from tasks.label import Params\n")
    Path("params.yaml").write_text(Path("params.yaml").read_text() + "label: {file: v1.csv}\nlearn: {file: v1.csv}\n")
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text() + LABEL_STAGE)
    line = "waiting for labels of v1, put them at labels/v1.csv"
    for _ in range(2):  # the next run waits, too
        result = recipe()
        assert result.returncode == 0, result.stderr
        assert result.stdout.endswith(f"\n{line}\n")
        assert re.search(r"label@v1 +waiting\n", result.stdout)
        assert re.search(r"learn +not started\n", result.stdout)
        assert re.search(r"shrink +(ran in|up to date)", result.stdout)
        assert f"Waiting('{line}', type=COMPLETED)" in result.stderr
        assert Path("data/publish").exists()
        assert not Path("data/label").exists()
    assert "FAILED" not in pipeline_runs()
    Path("labels/v1.csv").write_text("a pair, its label\n")
    result = recipe()
    assert result.returncode == 0, result.stderr
    assert "The pipeline is up to date" in result.stdout
    assert line not in result.stdout
    assert Path("data/learn/labels.txt").read_text() == "a pair, its label\n"
    assert pipeline_runs()[-1] == "FINISHED"


@pytest.mark.slow
def test_a_stage_that_fails_after_it_waited_is_a_failure(workspace: Path) -> None:
    Path("labels").mkdir()
    Path("labels/README.md").write_text("Labels of people.\n")
    Path("tasks/label.py").write_text(LABEL)
    Path("params.yaml").write_text(Path("params.yaml").read_text() + "label: {file: v1.csv}\n")
    Path("dvc.yaml").write_text(Path("dvc.yaml").read_text() + LABEL_STAGE.partition("  learn:")[0])
    assert recipe("label").stdout.endswith("put them at labels/v1.csv\n")
    Path("labels/v1.csv").mkdir()
    result = recipe("label")
    assert result.returncode == 1
    assert "stage `label@v1` failed: IsADirectoryError" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_flow_leaves_no_process_and_no_half_output(workspace: Path, how: signal.Signals) -> None:
    set_value("seconds: 0.0", "seconds: 0.5")
    set_value("num_steps: 3", "num_steps: 600")
    flow = subprocess.Popen([sys.executable, "-m", "flows.recipe"], start_new_session=True)
    wait_for(lambda: any(len(list(metric_lines(path))) >= 2 for path in Path(".runs/grow").glob("*")), 120)
    assert "another pipeline is running in this workspace (flow run" in recipe().stderr
    assert "is busy, it is being blocked by" in repro("grow").stderr
    os.killpg(flow.pid, how) if how == signal.SIGINT else flow.send_signal(how)
    flow.wait(timeout=60)
    assert how != signal.SIGINT or flow.returncode == 130
    wait_for(lambda: not processes_in(workspace))
    assert not Path("data/grow").exists()
    assert not Path("dvc.lock").exists()


@pytest.mark.slow
def test_a_scheduled_deployment_is_run_by_a_worker_and_can_be_cancelled(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(__file__).parent.parent
    port = free_port()
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{port}/api")
    monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", f"sqlite+aiosqlite:///{workspace.parent}/prefect.db")
    monkeypatch.setenv("PWD", str(workspace))  # as a shell sets it; prefect.yaml reads it
    prefect = [sys.executable, "-m", "prefect"]
    (workspace / "flows").symlink_to(source / "flows")
    deployments = YAML(typ="safe").load((source / "prefect.yaml").read_text())
    deployments["deployments"][0]["schedules"][0]["cron"] = "* * * * *"  # nightly
    with Path("prefect.yaml").open("w") as file:
        YAML(typ="safe").dump(deployments, file)
    processes = [subprocess.Popen([*prefect, "server", "start", "--host", "127.0.0.1", "--port", str(port)])]
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/api/health"), 120)
        pool = deployments["deployments"][0]["work_pool"]["name"]
        subprocess.run([*prefect, "work-pool", "create", pool, "--type", "process"], check=True)
        subprocess.run([*prefect, "--no-prompt", "deploy", "--all"], check=True)
        processes.append(subprocess.Popen([*prefect, "worker", "start", "--pool", pool, "--type", "process"]))
        wait_for(lambda: Path("data/publish/outputs.csv").exists(), 180)
        wait_for(lambda: "COMPLETED" in flow_run_states(port), 60)
        subprocess.run([*prefect, "deployment", "run", "round/weekly-round"], check=True)
        wait_for(lambda: any("`rounds` is None: it must hold entries" in text for text in messages(port)), 120)
        set_value("num_steps: 3", "num_steps: 500")
        set_value("seconds: 0.0", "seconds: 0.5")
        wait_for(lambda: any(p.info["cmdline"][-2:] == ["-m", "tasks.grow"] for p in processes_in(workspace)), 180)
        subprocess.run([*prefect, "work-pool", "pause", pool], check=True)  # or the next minute's run begins meanwhile
        wait_for(lambda: "RUNNING" in flow_run_states(port))
        running = flow_run_states(port)["RUNNING"]
        subprocess.run([*prefect, "flow-run", "cancel", running], check=True)
        wait_for(lambda: not any("grow" in " ".join(p.info["cmdline"]) for p in processes_in(workspace)), 90)
        wait_for(lambda: "CANCELLED" in flow_run_states(port), 60)
        assert not Path("data/grow").exists()
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=180)
    wait_for(lambda: not processes_in(workspace))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except OSError:
        time.sleep(0.5)
        return False


def flow_runs(port: int) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/flow_runs/filter", b"{}", {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return list(json.load(response))


def flow_run_states(port: int) -> dict[str, str]:
    return {run["state_type"]: run["id"] for run in flow_runs(port)}


def messages(port: int) -> list[str]:
    return [str(run["state"]["message"]) for run in flow_runs(port)]


@pytest.mark.slow
def test_the_most_urgent_stage_gets_the_next_seat_and_the_first_of_equals() -> None:
    seats, taken = Seats(1), []

    def stage(name: str, urgency: int) -> threading.Thread:
        def run() -> None:
            with seats.taken(urgency):
                taken.append(name)

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    with seats.taken(0):
        threads = []
        for number, (name, urgency) in enumerate([("control", 2), ("other", 2), ("round", 9), ("report", 1)], start=1):
            threads.append(stage(name, urgency))
            wait_for(lambda number=number: len(seats._waiting) == number)
    for thread in threads:
        thread.join(timeout=60)
    assert taken == ["round", "control", "other", "report"]


def test_the_more_stages_wait_for_one_the_more_urgent_it_is() -> None:
    after = {"a": (), "b": ("a",), "c": ("a",), "d": ("c",), "e": ("b", "d"), "f": ("gone",)}
    nodes = [graph.Node(name, name, before, {}) for name, before in after.items()]
    assert graph.count_waiting(nodes) == {"a": 4, "b": 1, "c": 2, "d": 1, "e": 0, "f": 0}


@pytest.mark.parametrize("num_seats", [1, 2])
def test_as_many_stages_are_on_the_accelerators_as_there_are_seats(workspace: Path, num_seats: int) -> None:
    stages, params = "stages:\n", Path("params.yaml").read_text()
    for name in ("left", "right"):
        shutil.copy("tasks/grow.py", f"tasks/{name}.py")
        params += f"{name}: {{num_steps: 8, seconds: 1.0, fail_at: null}}\n"
        stages += (
            f"  {name}:\n    cmd: exec {sys.executable} -m tasks.{name}\n    params: [seed, {name}]\n"
            f"    outs: [data/{name}]\n    meta: {{seat: accelerator}}\n"
        )
    Path("dvc.yaml").write_text(stages)
    Path("params.yaml").write_text(params.replace("num_seats: 1", f"num_seats: {num_seats}"))
    done = recipe()
    assert done.returncode == 0, done.stderr
    runs = [json.loads(path.read_text()) for path in Path(".runs").glob("*/*/run.json")]
    first, second = sorted(runs, key=lambda run: float(run["started"]))
    assert (second["started"] < first["ended"]) == (num_seats == 2)
