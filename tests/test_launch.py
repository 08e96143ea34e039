from __future__ import annotations

import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from test_stage import processes_in, set_value, wait_for

from tasks.running.fingerprint import fingerprint
from tasks.running.params import Machine
from tasks.running.processes import PIPELINE_VARIABLE
from tasks.workers import launch as launch_module
from tasks.workers.launch import PORTS, command_line, free_port

RANKS = """
import os, sys, time
from pathlib import Path

from tasks.running.processes import die_with_parent

die_with_parent()
Path(f"rank{os.environ['RANK']}").write_text(
    f"{os.environ['WORLD_SIZE']} {os.environ['OMP_NUM_THREADS']} {os.environ['MASTER_ADDR']} {' '.join(sys.argv[1:])}"
)
if "wait" in sys.argv:
    time.sleep(120)
"""


def machine(num_ranks: int, hostfile: str | None = None) -> Machine:
    return Machine(threads=1, workers=1, scheduler=None, num_ranks=num_ranks, hostfile=hostfile)


@pytest.fixture
def ranks(workspace: Path) -> Path:
    """The workspace with a stage `tasks.ranks` whose ranks write what they were given."""
    (workspace / "tasks" / "ranks.py").write_text(RANKS)
    with (workspace / "dvc.yaml").open("a") as file:
        file.write('  ranks:\n    foreach: {v5: 5, wait: 6}\n    do: {cmd: "x ${key}", outs: ["data/ranks/${key}"]}\n')
    return workspace


def launch(*arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "tasks.workers.launch", "ranks", *arguments])


def test_one_rank_is_this_very_process(ranks: Path) -> None:
    process = launch("v5")
    assert process.wait(timeout=60) == 0
    assert Path("rank0").read_text() == f"1 1 127.0.0.1 v5 --fingerprint={fingerprint('ranks@v5').digest}"


def test_several_ranks_are_started_by_deepspeeds_launcher(ranks: Path) -> None:
    set_value("num_ranks: 1", "num_ranks: 2")
    assert launch("v5").wait(timeout=120) == 0
    for rank in (0, 1):
        world, threads, address, *arguments = Path(f"rank{rank}").read_text().split()
        assert (world, threads, address) == ("2", "1", "127.0.0.1")
        assert "v5" in arguments
        assert any(argument.startswith("--pipeline=") for argument in arguments)


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


def test_hosts_come_from_the_hostfile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PIPELINE_VARIABLE, "flow-7")
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node-1 slots=8\nnode-2 slots=8\n")
    command = command_line("ppo", ["v5"], "0a1b", machine(8, str(hostfile)))
    assert command[1:] == [
        *["-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile)],
        *["--module", "tasks.ppo", "v5", "--fingerprint=0a1b", "--pipeline=flow-7", "--locked"],
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


def test_a_missing_hostfile_is_named() -> None:
    with pytest.raises(ValueError, match=r"`machine.hostfile` is nowhere, which does not exist: write one line a host"):
        command_line("ppo", [], "0a1b", machine(8, "nowhere"))


def test_a_port_is_free_and_no_outgoing_connection_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not set(PORTS) & set(range(first, last + 1))
    one = free_port()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", one))
        other = free_port()
        monkeypatch.setattr(launch_module, "PORTS", [one, other])
        assert {free_port() for _ in range(20)} == {other}
