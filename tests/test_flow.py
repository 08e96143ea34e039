from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import repro
from dvc.repo import Repo
from ruamel.yaml import YAML
from test_stage import processes_in, set_value, wait_for

from flows.graph import find_stale, read_graph
from flows.summary import format_number, main_figures, summarize
from tasks.stage import metric_lines


def recipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.recipe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def lock() -> object:
    return YAML(typ="safe").load(Path("dvc.lock").read_text())


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
    text = summarize(nodes, {"grow": "ran in 3 s", "shrink": "up to date"}, 4.2)
    assert "  grow    ran in 3 s    size 12,345\n  shrink  up to date\n" in text
    assert "make ui" in text
    assert format_number(0.123456) == "0.1235"


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


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_flow_leaves_no_process_and_no_half_output(workspace: Path, how: signal.Signals) -> None:
    set_value("seconds: 0.0", "seconds: 0.5")
    set_value("num_steps: 3", "num_steps: 60")
    flow = subprocess.Popen([sys.executable, "-m", "flows.recipe"], start_new_session=True)
    wait_for(lambda: any(len(list(metric_lines(path))) >= 2 for path in Path(".runs/grow").glob("*")), 120)
    assert "another pipeline runs in this workspace (flow run" in recipe().stderr
    assert "is busy, it is being blocked by" in repro("grow").stderr
    os.killpg(flow.pid, how) if how == signal.SIGINT else flow.send_signal(how)
    flow.wait(timeout=60)
    assert how != signal.SIGINT or flow.returncode == 130
    wait_for(lambda: not processes_in(workspace))
    assert not Path("data/grow").exists()
    assert not Path("dvc.lock").exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    for deployment in deployments["deployments"]:
        for schedule in deployment["schedules"]:
            schedule["cron"] = "* * * * *"
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
        set_value("num_steps: 3", "num_steps: 500")
        set_value("seconds: 0.0", "seconds: 0.5")
        wait_for(lambda: any(p.cmdline()[-2:] == ["-m", "tasks.grow"] for p in processes_in(workspace)), 180)
        running = flow_run_states(port)["RUNNING"]
        subprocess.run([*prefect, "flow-run", "cancel", running], check=True)
        wait_for(lambda: not any("grow" in p.cmdline() for p in processes_in(workspace)), 90)
        wait_for(lambda: "CANCELLED" in flow_run_states(port), 60)
        assert not Path("data/grow").exists()
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=60)
    wait_for(lambda: not processes_in(workspace))


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except OSError:
        time.sleep(0.5)
        return False


def flow_run_states(port: int) -> dict[str, str]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/api/flow_runs/filter", b"{}", {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=10) as response:
        return {run["state_type"]: run["id"] for run in json.load(response)}
