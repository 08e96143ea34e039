"""Stages for tests: run in this process, or in a DVC repository of their own as the pipeline starts them."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import chdir
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any, TypeVar

from conftest import LEFT_BEHIND, QUIET, empty_repository
from pydantic import BaseModel
from ruamel.yaml import YAML

from flows.servers import free_port
from tasks.running.params import Machine
from tasks.running.processes import FINGERPRINT_ARGUMENT
from tasks.running.stage import Stage
from tasks.workers.launch import identify

REPOSITORY = Path(__file__).parent.parent
THREADS = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}  # as tasks.workers.launch sets them
PRELOADED = [
    "tasks.pretrain.__main__", "tasks.sft", "tasks.reward_safety", "tasks.evaluate", "dvc.repo", "dvc.stage.serialize",
    "pandas", "matplotlib.pyplot", "torch._dynamo", "deepspeed.runtime.engine",
    "deepspeed.runtime.zero.muon.original_muon",  # torch's compiler, which DeepSpeed imports as it starts
]  # fmt: skip
P = TypeVar("P", bound=BaseModel)


def stage_here(name: str, params: P, fresh: bool = True) -> Stage[P]:
    """A stage with its directories in the working directory; unless fresh, `scratch` stays as a stopped run left it."""
    machine = Machine(threads=1, workers=1, scheduler=None, num_ranks=1, hostfile=None, num_seats=1)
    stage = Stage(name, params, 1, machine, Path("out"), Path("scratch"), Path("record"))
    for directory in (stage.output, stage.scratch, stage.record):
        if fresh or directory != stage.scratch:
            shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(exist_ok=True)
    return stage


@cache
def fork_server() -> ForkServerContext:
    """A process that has imported what stages that train import, and becomes one of them at once; it does no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(THREADS)
    with chdir(REPOSITORY):
        forkserver.ensure_running()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def become_rank(root: Path, environment: Mapping[str, str], arguments: Sequence[str]) -> None:
    """What tasks.workers.launch comes to in each rank, in a process that the server has forked."""
    os.chdir(root)
    errors = os.open(f"errors{environment['RANK']}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(errors, 2)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = arguments
    runpy.run_module(f"tasks.{arguments[0]}", run_name="__main__", alter_sys=True)


class Workspace:
    """A DVC repository with one stage, `name` with its place where it has one: `sft`, `reward_safety v1`."""

    def __init__(self, root: Path, name: str, dvc_stage: str, num_ranks: int = 1, **sections: Any) -> None:
        self.root, self.arguments, self.num_ranks = root, name.split(), num_ranks
        shutil.copytree(empty_repository(), root, dirs_exist_ok=True)
        alone = {"threads": 1, "workers": 1, "scheduler": None, "hostfile": None, "num_seats": 1}
        machine = {**alone, "num_ranks": num_ranks}
        params = {"seed": 1, "tracking": {"experiment": "test"}, "machine": machine, **sections}
        with (root / "params.yaml").open("w") as file:
            YAML().dump(params, file)
        (root / "dvc.yaml").write_text(dvc_stage)
        self.environment = {**os.environ, **QUIET, "PYTHONPATH": str(REPOSITORY)}
        for variable in LEFT_BEHIND:
            self.environment.pop(variable, None)

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

    def fork(self) -> list[ForkServerProcess]:
        """Start the stage's ranks without the seconds that imports take."""
        alone = {**self.environment, **THREADS, "WORLD_SIZE": str(self.num_ranks), "LOCAL_SIZE": str(self.num_ranks)}
        alone |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        with chdir(self.root):  # by the fingerprint a rank sees that it is one of this pipeline's launcher
            arguments = [*self.arguments, f"{FINGERPRINT_ARGUMENT}{identify('@'.join(self.arguments))}"]
        processes = []
        for rank in map(str, range(self.num_ranks)):
            environment = {**alone, "RANK": rank, "LOCAL_RANK": rank}
            processes.append(fork_server().Process(target=become_rank, args=(self.root, environment, arguments)))
            processes[-1].start()
        return processes

    def finish(self) -> dict[str, float]:
        """The figures of a run in forked ranks."""
        for rank, process in enumerate(self.fork()):
            process.join(timeout=300)
            assert process.exitcode == 0, self.errors(rank)
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

    def kill_at_random(self, num_kills: int, seconds: float, rng: random.Random, whole: Mapping[str, bytes]) -> None:
        """Start the stage again and again, and kill it at moments of the first `seconds`, until that often.

        Each start goes on from where the kill before it left the stage. One that finishes must have written `whole`,
        and the next one begins anew.
        """
        while num_kills > 0:
            (process,) = self.fork()
            process.join(timeout=rng.uniform(0, seconds))
            if process.is_alive():
                os.kill(process.pid or 0, rng.choice([signal.SIGKILL, signal.SIGTERM]))
                process.join(timeout=300)
            num_kills -= process.exitcode != 0
            assert process.exitcode in (0, -signal.SIGKILL, -signal.SIGTERM, 130), self.errors(0)
            if self.output.exists():
                assert self.files == whole
                shutil.rmtree(self.output)
                shutil.rmtree(self.root.joinpath(".scratch", *self.arguments))

    def errors(self, rank: int) -> str:
        return (self.root / f"errors{rank}.txt").read_text()
