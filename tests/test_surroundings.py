"""The places that the pipeline is run in: proxies, dead servers, moved folders, other launchers, other users."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import migrated_prefect, repro
from test_stage import set_value

from flows.servers import answers, is_reachable

NOWHERE = "http://user:secret@127.0.0.1:1"  # nothing listens on port 1


@pytest.fixture(autouse=True)
def prefect_home(tmp_path: Path) -> None:
    shutil.copytree(migrated_prefect(), tmp_path / "prefect")


def recipe(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.recipe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def runs(root: Path) -> dict[str, Path]:
    """Return the folder of artifacts of each stage's newest run, from the store below `root`."""
    program = (
        "import sys, mlflow; from urllib.parse import urlparse, unquote\n"
        "for run in mlflow.MlflowClient(sys.argv[1]).search_runs(['1']):\n"
        "    print(run.info.run_name, unquote(urlparse(run.info.artifact_uri).path), sep='|')\n"
    )
    uri = f"sqlite:///{root}/mlflow.db"
    done = subprocess.run([sys.executable, "-c", program, uri], capture_output=True, text=True, check=True)
    lines = [line.partition("|") for line in done.stdout.splitlines()]
    return {name: Path(place) for name, _, place in reversed(lines)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["http_proxy", "ALL_PROXY"])
def test_a_proxy_is_not_asked_for_servers_of_this_machine(workspace, monkeypatch, name):
    monkeypatch.setenv(name, NOWHERE)
    done = recipe("grow")
    assert done.returncode == 0, done.stderr
    assert "ran in" in done.stdout


def test_a_prefect_server_that_does_not_answer_is_named_without_its_password(workspace, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", f"{NOWHERE}/api")
    done = recipe("grow")
    assert done.returncode == 1
    assert "PREFECT_API_URL is http://127.0.0.1:1/api, where no Prefect server answers" in done.stderr
    assert "unset it" in done.stderr
    assert "secret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_only_says_no_is_reachable_but_is_not_prefects():
    class No(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

    with HTTPServer(("127.0.0.1", 0), No) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/api/health"
        assert is_reachable(url)
        assert not answers(url)
        server.shutdown()
    assert not is_reachable(url)
    assert not is_reachable("no address")


def test_an_mlflow_server_that_does_not_answer_is_named_without_its_password(workspace, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOWHERE)
    done = repro("publish")
    assert done.returncode != 0
    assert "start it or correct MLFLOW_TRACKING_URI" in done.stderr
    assert "secret" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert Path("data/shrink/shrunk.txt").exists()


def test_a_deleted_experiment_is_named_with_what_restores_it(workspace):
    assert repro("grow").returncode == 0
    program = "import mlflow; mlflow.MlflowClient('sqlite:///mlflow.db').delete_experiment('1')"
    subprocess.run([sys.executable, "-c", program], check=True)
    done = repro("publish")
    assert done.returncode != 0
    assert "MLflow's experiment `test` was deleted" in done.stderr
    assert "mlflow experiments restore --experiment-id 1" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_copied_workspace_keeps_its_own_artifacts(workspace, tmp_path):
    assert repro("publish").returncode == 0
    before = {path: path.stat().st_mtime_ns for path in (workspace / "mlartifacts").rglob("*")}
    copy = tmp_path / "copy"
    shutil.copytree(workspace, copy, symlinks=True)
    os.chdir(copy)
    set_value("num_steps: 3", "num_steps: 2")
    assert repro("publish").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in (workspace / "mlartifacts").rglob("*")} == before
    folders = runs(copy)
    assert (folders["grow"] / "note.txt").read_text() == "seen\n"
    assert all(folder.is_relative_to(copy) for folder in folders.values())


def test_a_question_mark_in_the_path_is_part_of_it(workspace, tmp_path):
    odd = tmp_path / "really?" / "100%"
    odd.parent.mkdir()
    workspace.rename(odd)
    os.chdir(odd)
    done = repro("publish")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "really").exists()
    assert len(list((odd / "mlartifacts").rglob("note.txt"))) == 1


def test_what_another_launcher_left_in_the_environment_changes_nothing(workspace, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    assert repro("grow").returncode == 0
    assert Path("data/grow/grown.txt").read_text() == "3 1\n"


@pytest.mark.slow
def test_a_home_that_can_not_be_written_to_is_no_obstacle(workspace, monkeypatch):
    monkeypatch.setenv("HOME", "/sys")  # nothing can be made there, even by root
    monkeypatch.delenv("PREFECT_HOME")
    for name in [name for name in os.environ if name.startswith("XDG_")]:
        monkeypatch.delenv(name)
    done = recipe("publish")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_clone_of_another_user_runs(workspace):
    for path in (Path(".git"), *Path(".git").rglob("*"), Path(".dvc"), *Path(".dvc").rglob("*"), Path()):
        os.chown(path, 12345, 12345, follow_symlinks=False)
    done = repro("publish")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seed", ["-1", "null"])
def test_a_wrong_seed_is_refused_before_an_output_goes(workspace, seed):
    assert repro("grow").returncode == 0
    done = recipe("grow", "--set", f"seed={seed}")
    assert done.returncode == 1
    assert "params.yaml: `seed` is " in done.stderr
    assert Path("data/grow/grown.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("is_archive", [True, False])
def test_it_runs_without_git_and_outside_a_repository(workspace, tmp_path, monkeypatch, is_archive):
    if is_archive:
        shutil.rmtree(".git")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sh", "cp", "env", "ps"):
        if shutil.which(name):
            (programs / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(programs))
    done = recipe("publish")
    assert done.returncode == 0, done.stderr
    set_value("num_steps: 3", "num_steps: 2")
    done = repro("publish")
    assert done.returncode == 0, done.stderr
