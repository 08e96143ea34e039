from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from test_stage import processes_in, set_value, wait_for

from tasks.running.fingerprint import fingerprint
from tasks.running.params import Machine
from tasks.running.processes import PIPELINE_VARIABLE
from tasks.workers.launch import LOOPBACK, launcher_arguments, read_machine

SECRET = "http://someone:password@mlflow"

RANKS = """
import os, sys, time
from pathlib import Path

from tasks.running.processes import die_with_parent

die_with_parent()
names = "WORLD_SIZE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GLOO_SOCKET_IFNAME", "MLFLOW_TRACKING_URI"
given = " ".join(os.environ.get(name, "none") for name in names)
Path(f"rank{os.environ['RANK']}").write_text(f"{given} {' '.join(sys.argv[1:])}")
if "wait" in sys.argv:
    time.sleep(120)
"""


# A stage whose ranks start an engine and stay until they are stopped.
TRAINING = """
import time
from pathlib import Path

import torch
from ranks import small_engine

from model.network.ranks import join_ranks
from tasks.running.processes import die_with_parent

die_with_parent()
join_ranks()
small_engine(20, zero_stage=1)
torch.distributed.barrier()
Path(f"rank{torch.distributed.get_rank()}").touch()
time.sleep(120)
"""


def machine(num_ranks: int, hostfile: str | None = None) -> Machine:
    return Machine(threads=1, workers=1, scheduler=None, num_ranks=num_ranks, hostfile=hostfile, num_seats=1)


@pytest.fixture
def ranks(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workspace with a stage `tasks.ranks` whose ranks write what they were given."""
    monkeypatch.setenv("TMPDIR", str(workspace.parent))
    (workspace / "tasks" / "ranks.py").write_text(RANKS)
    with (workspace / "dvc.yaml").open("a") as file:
        file.write('  ranks:\n    foreach: {v5: 5, wait: 6}\n    do: {cmd: "x ${key}", outs: ["data/ranks/${key}"]}\n')
    return workspace


def told() -> str:
    """What ranks of `ranks@v5` are told of it."""
    return f"--fingerprint={fingerprint('ranks@v5').digest}"


def launch(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tasks.workers.launch", "ranks", *arguments])


def test_one_rank_is_this_very_process(ranks: Path) -> None:
    process = launch("v5")
    assert process.wait(timeout=60) == 0
    assert Path("rank0").read_text() == f"1 1 passive {LOOPBACK} none v5 {told()}"


def test_several_ranks_are_started_by_deepspeeds_launcher(ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET)
    monkeypatch.setenv(PIPELINE_VARIABLE, "flow-7")
    set_value("num_ranks: 1", "num_ranks: 2")
    assert launch("v5").wait(timeout=120) == 0
    expected = f"2 1 passive {LOOPBACK} {SECRET} v5 {told()} --pipeline=flow-7 --locked"
    assert [Path(f"rank{rank}").read_text() for rank in (0, 1)] == [expected, expected]
    assert not list(ranks.parent.glob("launch-*"))  # nothing private is left behind


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_training_on_one_host_listens_on_the_loopback_only(
    num_ranks: int, ranks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("tasks/ranks.py").write_text(TRAINING)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    set_value("num_ranks: 1", f"num_ranks: {num_ranks}")
    process = launch("v5")
    wait_for(lambda: all(Path(f"rank{rank}").exists() for rank in range(num_ranks)), seconds=240)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    listening = [
        connection.laddr.ip
        for one in family
        for connection in one.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    process.terminate()
    process.wait(timeout=60)
    assert set(listening) <= {"127.0.0.1", "::1"}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_their_launcher(ranks: Path, how: signal.Signals) -> None:
    set_value("num_ranks: 1", "num_ranks: 2")
    process = launch("wait")
    wait_for(lambda: Path("rank0").exists() and Path("rank1").exists())
    process.send_signal(how)
    process.wait(timeout=60)
    wait_for(lambda: not processes_in(ranks))
    assert not processes_in(ranks)


def test_the_launcher_ends_with_the_process_that_started_it(ranks: Path) -> None:
    set_value("num_ranks: 1", "num_ranks: 2")
    program = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'tasks.workers.launch', 'ranks', 'wait'])"
    starter = subprocess.Popen([sys.executable, "-c", program])
    wait_for(lambda: Path("rank0").exists() and Path("rank1").exists())
    starter.kill()
    starter.wait()
    wait_for(lambda: not processes_in(ranks))
    assert not processes_in(ranks)


# What stands in for the cluster: both hosts are this one, and what would go over the wire is kept.
SSH = """#!/bin/sh
echo 127.0.0.1
"""
PDSH = """#!/bin/sh
shift 5
echo "$*" > wire
stat -c %a .scratch/launch-*/* > mode
for number in 0 1; do echo "$*" | sed "s/%n/$number/" | sh & done
wait
"""


@pytest.mark.slow
def test_ranks_on_other_hosts_get_threads_and_rank_0_the_secrets(ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, program in {"ssh": SSH, "pdsh": PDSH}.items():
        (ranks / "bin").mkdir(exist_ok=True)
        (ranks / "bin" / name).write_text(program)
        (ranks / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{ranks / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SECRET)
    monkeypatch.setenv(PIPELINE_VARIABLE, "flow-7")
    (ranks / "hosts").write_text("node-1 slots=1\nnode-2 slots=1\n")
    set_value("hostfile: null", "hostfile: hosts")
    assert launch("v5").wait(timeout=180) == 0
    assert Path("rank0").read_text() == f"2 1 passive none {SECRET} v5 {told()} --pipeline=flow-7 --locked"
    assert Path("rank1").read_text() == f"2 1 passive none none v5 {told()} --pipeline=flow-7 --locked"
    assert "--rank" in Path("wire").read_text() and "MLFLOW" not in Path("wire").read_text()
    assert Path("mode").read_text() == "600\n"
    assert not list(Path(".scratch").glob("launch-*"))


def test_a_rank_that_deepspeed_started_becomes_its_stage(ranks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracking = Path("tracking.json")
    tracking.write_text(json.dumps({"MLFLOW_TRACKING_URI": SECRET}))
    command = [sys.executable, "-m", "tasks.workers.launch", "--rank", "tracking.json", "ranks", "v5", "--locked"]
    for rank, secret in {"1": "none", "0": SECRET}.items():
        assert tracking.exists()
        subprocess.run(command, check=True, env={**os.environ, "RANK": rank, "WORLD_SIZE": "2"})
        assert Path(f"rank{rank}").read_text() == f"2 1 passive {LOOPBACK} {secret} v5 --locked"
    assert not tracking.exists()


def test_hosts_come_from_the_hostfile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PIPELINE_VARIABLE, "flow-7")
    assert launcher_arguments("ppo", ["v5"], machine(8, "hosts"), Path("private")) == [
        *["deepspeed.launcher.runner", "--hostfile", "hosts", "--no_local_rank", "--module"],
        *["tasks.workers.launch", "--rank", "private/tracking.json", "ppo", "v5", "--pipeline=flow-7", "--locked"],
    ]


@pytest.mark.parametrize("victim", ["rank0", "rank1"])
def test_ranks_end_with_one_of_them(ranks: Path, victim: str) -> None:
    Path("tasks/ranks.py").write_text(
        RANKS.replace("if", "Path(f\"pid_rank{os.environ['RANK']}\").write_text(str(os.getpid()))\nif")
    )
    set_value("num_ranks: 1", "num_ranks: 2")
    process = launch("wait")
    wait_for(lambda: all(path.exists() and path.read_text() for path in (Path("pid_rank0"), Path("pid_rank1"))))
    psutil.Process(int(Path(f"pid_{victim}").read_text())).kill()
    assert process.wait(timeout=60) != 0
    wait_for(lambda: not processes_in(ranks))
    assert not processes_in(ranks)


def test_a_stage_has_to_be_named(ranks: Path) -> None:
    result = subprocess.run([sys.executable, "-m", "tasks.workers.launch"], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "launch: name the training stage to start: `python -m tasks.workers.launch pretrain`\n"


def test_a_missing_hostfile_is_named(workspace: Path) -> None:
    set_value("hostfile: null", "hostfile: nowhere")
    with pytest.raises(
        ValueError, match=r"`machine.hostfile` is nowhere, which does not exist: write one line per host"
    ):
        read_machine("grow")
