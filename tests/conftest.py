from __future__ import annotations

import atexit
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

from flows.servers import free_port

# Examples are drawn anew at each run by hand, and are the same in CI. No deadline: a machine that stalls is no failure.
settings.register_profile("arriero", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("arriero")

# What a shell starts in the background ignores Ctrl-C, and so would the processes that tests send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)

TOY_PARAMS = """\
seed: 1
tracking:
  experiment: test
machine:
  threads: 1
  workers: 1
  scheduler: null
  num_ranks: 1
  hostfile: null
  num_seats: 1
grow:
  num_steps: 3        # steps to take
  seconds: 0.0        # time of one step
  fail_at: null       # step that fails
shrink:
  factor: 0.5
publish:
  registered_model_prefix: toy
"""

# Two real stages of a toy pipeline: one logs metrics step by step and can resume, one reads its output.
TOY_STAGES = {
    "grow.py": """
import time
from pydantic import Field
from tasks.running.params import Section
from tasks.running.stage import Stage, start
from tasks.running.files import write_json


class Params(Section):
    num_steps: int = Field(gt=0, description="steps to take")
    seconds: float = Field(ge=0, description="time of one step")
    fail_at: int | None = Field(description="step that fails")


def run(stage: Stage[Params]) -> dict[str, float]:
    state = stage.scratch / "state.txt"
    step = int(state.read_text()) if state.exists() else 0
    while step < stage.params.num_steps:
        step += 1
        if step == stage.params.fail_at:
            raise ValueError(f"grow.fail_at: step {step} was told to fail")
        time.sleep(stage.params.seconds)
        stage.log({"train/loss": 1 / step}, step=step, tokens=10 * step)
        write_json(state, step)  # whole, or as it was
    (stage.output / "grown.txt").write_text(f"{step} {stage.seed}\\n")
    (stage.artifacts / "note.txt").write_text("seen\\n")
    (stage.tables / "steps.csv").write_text("step,loss\\n1,1.0\\n")
    return {"size": step}


if __name__ == "__main__":
    start(Params, run)
""",
    "shrink.py": """
from pathlib import Path
from pydantic import Field
from tasks.running.params import Section
from tasks.running.stage import Stage, start


class Params(Section):
    factor: float = Field(gt=0, lt=1, description="share that stays")


def run(stage: Stage[Params]) -> dict[str, float]:
    size = int(Path("data/grow/grown.txt").read_text().split()[0])
    (stage.output / "shrunk.txt").write_text(f"{size * stage.params.factor}\\n")
    return {"size": size * stage.params.factor}


if __name__ == "__main__":
    start(Params, run)
""",
}

TOY_DVC = f"""\
stages:
  grow:
    cmd: exec {sys.executable} -m tasks.grow
    deps:
    - tasks/grow.py
    params:
    - machine.num_ranks
    - seed
    - grow
    outs:
    - data/grow
    meta:
      figures: [size]
  shrink:
    cmd: exec {sys.executable} -m tasks.shrink
    deps:
    - tasks/shrink.py
    - data/grow
    params:
    - seed
    - shrink
    outs:
    - data/shrink
    meta:
      figures: [size]
  publish:
    cmd: exec {sys.executable} -m tasks.publish
    deps:
    - data/shrink/metrics.json
    params:
    - publish
    outs:
    - data/publish:
        persist: true
"""

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_ENABLED": "true",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_AUTHOR_NAME": "test",
    "GIT_AUTHOR_EMAIL": "test@example.org",
    "GIT_COMMITTER_NAME": "test",
    "GIT_COMMITTER_EMAIL": "test@example.org",
}


# What tests that join ranks, and MLflow, leave in this process's environment: a stage must not find it.
LEFT_BEHIND = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "ARRIERO_PIPELINE",
    "GLOO_SOCKET_IFNAME", "MLFLOW_TRACKING_URI", "PREFECT_API_URL",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with many slow tests first: a process that gets such a file last would keep all others waiting."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def once(name: str) -> Path:
    """An empty folder for what this process makes once and copies for each test; it goes with the process."""
    path = Path(tempfile.mkdtemp(prefix=f"{name}-"))
    atexit.register(shutil.rmtree, path)
    return path


@cache
def empty_repository() -> Path:
    """A git and DVC repository with MLflow's database and nothing in them: these take seconds to make."""
    root = once("empty-repository")
    environment = {**os.environ, **QUIET}
    program = "import sys, mlflow; mlflow.MlflowClient(sys.argv[1]).search_experiments()"
    for command in (
        ["git", "init", "-q"],
        [sys.executable, "-m", "dvc", "init", "-q"],
        [sys.executable, "-m", "dvc", "config", "core.analytics", "false"],
        [sys.executable, "-c", program, f"sqlite:///{root}/mlflow.db"],
    ):
        subprocess.run(command, check=True, cwd=root, env=environment)
    return root


@cache
def migrated_prefect() -> Path:
    """A home of Prefect whose database has its tables: a server that starts in an empty one makes them first."""
    home = once("prefect")
    command = [sys.executable, "-m", "prefect", "server", "database", "upgrade", "-y"]
    environment = {**os.environ, **QUIET, "PREFECT_HOME": str(home)}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return home


@cache
def toy_repository() -> Path:
    """The toy pipeline in a git and DVC repository."""
    root = once("toy-repository") / "workspace"
    shutil.copytree(empty_repository(), root)
    (root / "params.yaml").write_text(TOY_PARAMS)
    (root / "dvc.yaml").write_text(TOY_DVC)
    (root / ".gitignore").write_text(".scratch/\n.runs/\nmlflow.db\nmlartifacts/\n__pycache__/\n")
    (root / "tasks").mkdir()
    for shared in (Path(__file__).parent.parent / "tasks").iterdir():
        (root / "tasks" / shared.name).symlink_to(shared)
    for name, text in TOY_STAGES.items():
        (root / "tasks" / name).write_text(text)
    subprocess.run(["git", "add", "-A"], check=True, cwd=root)
    subprocess.run(["git", "commit", "-qm", "toy"], check=True, cwd=root, env={**os.environ, **QUIET})
    return root


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git and DVC repository of its own with the toy pipeline; the working directory of the test."""
    root = tmp_path / "workspace"
    shutil.copytree(toy_repository(), root, symlinks=True)
    monkeypatch.chdir(root)
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    monkeypatch.setenv("PREFECT_SERVER_API_PORT", str(free_port()))  # not the one of a `make ui` beside the tests
    for name in LEFT_BEHIND:
        monkeypatch.delenv(name, raising=False)
    return root


def repro(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `dvc repro` in the working directory."""
    command = [sys.executable, "-m", "dvc", "repro", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)
