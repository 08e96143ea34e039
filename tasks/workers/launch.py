"""Start a training stage: `python -m tasks.workers.launch <stage> [item]`, the command of every stage that trains.

`machine` in params.yaml says how many processes, and where. Several are started by DeepSpeed's launcher, on the hosts
of `machine.hostfile` or on this one. A single process needs of it only six variables in its environment, and not the
four seconds that the launcher takes to start: this process becomes that rank.
"""

from __future__ import annotations

import base64
import json
import os
import secrets
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from tasks.running.files import write_json
from tasks.running.fingerprint import fingerprint
from tasks.running.params import Machine, parse_section, read_params
from tasks.running.places import SCRATCH, place_of
from tasks.running.processes import (
    FINGERPRINT_ARGUMENT,
    LAUNCHER_VARIABLE,
    LOCKED_ARGUMENT,
    PIPELINE_ARGUMENT,
    PIPELINE_VARIABLE,
    die_with_parent,
    pipeline_id,
)
from tasks.running.scratch import FAILURES, IDENTITY

PORTS = range(20000, 32000)


def free_port() -> int:
    """Return a port of 127.0.0.1 on which nothing listens.

    It is none of those that systems give to outgoing connections: one of these could take it before a server does.
    """
    while True:
        port = secrets.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def identify(name: str) -> str:
    """Find out a stage's identity once for all its ranks, leave it in the scratch, and return its digest.

    Every rank hashing all the data by itself would keep rank 0 waiting. Raises ValueError as `fingerprint` does.
    """
    identity = fingerprint(name)
    scratch = SCRATCH / place_of(name) / identity.digest
    for failure in scratch.glob(FAILURES):  # of a run before
        failure.unlink()
    write_json(scratch / IDENTITY, identity._asdict())
    return identity.digest


def command_line(stage: str, items: Sequence[str], digest: str, machine: Machine) -> list[str]:
    """Return the command that starts a stage's ranks, whose digest is known.

    The launcher stands between the ranks and the pipeline, so they are told which pipeline run they belong to.
    Raises ValueError when the hostfile is missing.
    """
    rank = [f"tasks.{stage}", *items, f"{FINGERPRINT_ARGUMENT}{digest}"]
    if machine.hostfile is None and machine.num_ranks == 1:
        return [sys.executable, "-m", *rank]
    rank.append(f"{PIPELINE_ARGUMENT}{pipeline_id()}")
    if PIPELINE_VARIABLE in os.environ:
        rank.append(LOCKED_ARGUMENT)
    if machine.hostfile is not None:
        if not Path(machine.hostfile).exists():
            raise ValueError(
                f"params.yaml: `machine.hostfile` is {machine.hostfile}, which does not exist: write one line a host, "
                "for instance `node-1 slots=8`, or set null to train on this host"
            )
        return [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", machine.hostfile, "--module", *rank]
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(machine.num_ranks))}).encode()).decode()
    launcher = [sys.executable, "-m", "deepspeed.launcher.launch", "--quiet", f"--world_info={world}"]
    return [*launcher, "--master_addr=127.0.0.1", f"--master_port={free_port()}", "--module", *rank]


def main() -> None:
    """Become the launcher, or the only rank."""
    die_with_parent()
    if len(sys.argv) == 1:
        sys.stderr.write("launch: name the training stage to start: `python -m tasks.workers.launch pretrain`\n")
        sys.exit(1)
    try:
        machine = parse_section(Machine, read_params(), "machine")
        stage, items = sys.argv[1], sys.argv[2:]
        command = command_line(stage, items, identify("@".join([stage, *items])), machine)
    except ValueError as error:
        sys.stderr.write(f"{sys.argv[1]}: {error}\n")
        sys.exit(1)
    # Read when torch is imported, never later. Threads that wait give way at once: spinning, as OpenMP does by itself,
    # slows training several times as soon as another program needs one of the processors.
    os.environ.update(OMP_NUM_THREADS=str(machine.threads), OMP_WAIT_POLICY="passive")
    if machine.hostfile is None and machine.num_ranks == 1:
        only_rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
        os.environ.update(only_rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    elif machine.hostfile is None:
        os.environ[LAUNCHER_VARIABLE] = str(os.getpid())  # the launcher takes over this process
    os.execv(command[0], command)  # noqa: S606 - a list, no shell


if __name__ == "__main__":
    main()
