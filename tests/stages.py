"""Stages for tests: run in this process, or in a DVC repository of their own as the pipeline starts them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, TypeVar

from conftest import LEFT_BEHIND, QUIET, empty_mlflow
from pydantic import BaseModel
from ruamel.yaml import YAML

from tasks.running.params import Machine
from tasks.running.stage import Stage

REPOSITORY = Path(__file__).parent.parent
P = TypeVar("P", bound=BaseModel)


def stage_here(name: str, params: P, fresh: bool = True) -> Stage[P]:
    """A stage with its directories in the working directory; unless fresh, `scratch` stays as a stopped run left it."""
    machine = Machine(threads=1, workers=1, scheduler=None, num_ranks=1, hostfile=None)
    stage = Stage(name, params, 1, machine, Path("out"), Path("scratch"), Path("record"))
    for directory in (stage.output, stage.scratch, stage.record):
        if fresh or directory != stage.scratch:
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(exist_ok=True)
    return stage


class Workspace:
    """A DVC repository with one stage, `name` with its place where it has one: `sft`, `reward_safety v1`."""

    def __init__(self, root: Path, name: str, dvc_stage: str, num_ranks: int = 1, **sections: Any) -> None:
        self.root, self.arguments = root, name.split()
        machine = {"threads": 1, "workers": 1, "scheduler": None, "num_ranks": num_ranks, "hostfile": None}
        params = {"seed": 1, "tracking": {"experiment": "test"}, "machine": machine, **sections}
        with (root / "params.yaml").open("w") as file:
            YAML().dump(params, file)
        (root / "dvc.yaml").write_text(dvc_stage)
        self.environment = {**os.environ, **QUIET, "PYTHONPATH": str(REPOSITORY)}
        for variable in LEFT_BEHIND:
            self.environment.pop(variable, None)
        shutil.copy(empty_mlflow(), root / "mlflow.db")
        for command in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"]):
            subprocess.run(command, check=True, cwd=root, env=self.environment)

    @property
    def output(self) -> Path:
        return self.root.joinpath("data", *self.arguments)

    @property
    def files(self) -> dict[str, bytes]:
        """All that the stage wrote into its output."""
        paths = (path for path in self.output.rglob("*") if path.is_file())
        return {str(path.relative_to(self.output)): path.read_bytes() for path in paths}

    def start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tasks.workers.launch", *self.arguments]
        return subprocess.Popen(command, cwd=self.root, env=self.environment, stderr=subprocess.PIPE, text=True)

    def finish(self) -> dict[str, float]:
        """The figures of the run."""
        process = self.start()
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        return self.figures()

    def figures(self) -> dict[str, float]:
        figures: dict[str, float] = json.loads((self.output / "metrics.json").read_text())
        return figures

    def repro(self) -> dict[str, float]:
        """The figures of the run, which DVC starts."""
        command = [sys.executable, "-m", "dvc", "repro", "-q", "@".join(self.arguments)]
        result = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=self.root, env=self.environment
        )
        assert result.returncode == 0, result.stderr
        return self.figures()

    def saved_steps(self) -> list[int]:
        states = self.root.joinpath(".scratch", *self.arguments).glob("*/resume/step-*")
        return [int(state.name.removeprefix("step-")) for state in states]

    def kill_at(self, step: int, how: signal.Signals) -> None:
        """Start the stage, and kill it once it has saved its state at that step or a later one."""
        process = self.start()
        deadline = time.monotonic() + 120
        while max(self.saved_steps(), default=0) < step:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(how)
        process.communicate(timeout=300)
        assert process.returncode != 0
