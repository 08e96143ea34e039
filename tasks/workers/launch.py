"""Start a stage on the accelerators: `python -m tasks.workers.launch <stage> [item]`, the command of all that use them.

`machine` in params.yaml says how many processes to start, and where. DeepSpeed's launcher starts several, on the hosts
of `machine.hostfile` or on this one. For a single process, four environment variables replace the launcher, which takes
seconds to start: this process becomes that rank.

Ranks on one host listen only on its loopback interface, and find each other through a private file. On the hosts of a
hostfile DeepSpeed starts `python -m tasks.workers.launch --rank FILE <stage> [item]`, which becomes the rank.
"""

from __future__ import annotations

import base64
import json
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from tasks.running.files import write_json
from tasks.running.fingerprint import fingerprint
from tasks.running.params import Machine, num_ranks_of, parse_section, read_params
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

RANK_ARGUMENT = "--rank"
TRACKING_FILE = "tracking.json"
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def identify(name: str) -> str:
    """Determine a stage's identity once for all its ranks, write it to the scratch, and return its digest.

    If every rank hashed all the data itself, rank 0 would have to wait. Raises ValueError as `fingerprint` does.
    """
    identity = fingerprint(name)
    scratch = SCRATCH / place_of(name) / identity.digest
    for failure in scratch.glob(FAILURES):  # left by an earlier run
        failure.unlink()
    write_json(scratch / IDENTITY, identity._asdict())
    return identity.digest


def read_machine(stage: str) -> Machine:
    """Return section `machine` of params.yaml, with the number of ranks that a stage's own section may have.

    Raises ValueError when it is wrong, or its hostfile is missing.
    """
    values = read_params()
    machine = parse_section(Machine, values, "machine")
    machine = machine.model_copy(update={"num_ranks": num_ranks_of(values, stage, machine)})
    if machine.hostfile is not None and not Path(machine.hostfile).exists():
        raise ValueError(
            f"params.yaml: `machine.hostfile` is {machine.hostfile}, which does not exist: write one line per host, "
            "for instance `node-1 slots=8`, or set null to train on this host"
        )
    return machine


def launcher_arguments(stage: str, items: Sequence[str], machine: Machine, private: Path) -> list[str]:
    """Return DeepSpeed's launcher, a module, and its arguments; `private` is a folder that only this user can read.

    The launcher stands between the ranks and the pipeline, so an argument tells them which pipeline run they belong to.
    """
    told = [*items, f"{PIPELINE_ARGUMENT}{pipeline_id()}"]
    if PIPELINE_VARIABLE in os.environ:
        told.append(LOCKED_ARGUMENT)
    module = ["--no_local_rank", "--module"]
    if machine.hostfile is not None:
        rank = ["tasks.workers.launch", RANK_ARGUMENT, str(private / TRACKING_FILE), stage, *told]
        return ["deepspeed.launcher.runner", "--hostfile", machine.hostfile, *module, *rank]
    world = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(machine.num_ranks))}).encode()).decode()
    meet = [f"--world_info={world}", f"--master_addr=file://{private / 'store'}"]
    return ["deepspeed.launcher.launch", "--quiet", *meet, *module, f"tasks.{stage}", *told]


def hide_tracking(path: Path) -> None:
    """Move MLflow's variables, which may hold a password, from the environment into a file private to this user.

    DeepSpeed's runner would write them into command lines, which everyone on the hosts can read.
    """
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("MLFLOW")}
    path.touch(mode=0o600)
    path.write_text(json.dumps(hidden), encoding="utf-8")


def become_rank(stage: str, items: Sequence[str]) -> None:
    """Become a rank of a stage; its environment must be ready."""
    os.execv(sys.executable, [sys.executable, "-m", f"tasks.{stage}", *items])  # noqa: S606 - a list, no shell


def become_launcher(stage: str, items: Sequence[str], machine: Machine) -> None:
    """Become DeepSpeed's launcher, on this host or for those of the hostfile; remove private files when it ends."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # until DeepSpeed has its own handler
    several_hosts = machine.hostfile is not None
    if several_hosts:
        SCRATCH.mkdir(exist_ok=True)  # all hosts see it
    else:
        os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    with TemporaryDirectory(prefix="launch-", dir=SCRATCH if several_hosts else None) as private:
        sys.argv = launcher_arguments(stage, items, machine, Path(private))
        if several_hosts:
            hide_tracking(Path(private, TRACKING_FILE))
        sys.modules["mlflow"] = None  # type: ignore[assignment]  # DeepSpeed's unused autotuner would import it: slow
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


def main() -> None:
    """Become the launcher, the only rank, or a rank that the launcher has started on some host."""
    die_with_parent()
    arguments = sys.argv[1:]
    if not arguments:
        sys.stderr.write("launch: name the training stage to start: `python -m tasks.workers.launch pretrain`\n")
        sys.exit(1)
    is_rank = arguments[0] == RANK_ARGUMENT
    stage, *items = arguments[2:] if is_rank else arguments
    try:
        machine = read_machine(stage)
        if not is_rank:
            items.append(f"{FINGERPRINT_ARGUMENT}{identify('@'.join(arguments))}")
    except ValueError as error:
        sys.stderr.write(f"{stage}: {error}\n")
        sys.exit(1)
    # torch reads these only when it is imported. Waiting threads yield at once: spinning, OpenMP's default, slows
    # training several times as soon as another program needs one of the processors.
    os.environ.update(OMP_NUM_THREADS=str(machine.threads), OMP_WAIT_POLICY="passive")
    if machine.hostfile is None:
        os.environ.update(GLOO_SOCKET_IFNAME=LOOPBACK, NCCL_SOCKET_IFNAME=LOOPBACK)
    if is_rank:
        if os.environ["RANK"] == "0":  # the one that reports to MLflow
            tracking = Path(arguments[1])
            os.environ.update(json.loads(tracking.read_text(encoding="utf-8")))
            tracking.unlink()
        become_rank(stage, items)
    elif machine.hostfile is None and machine.num_ranks == 1:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1")
        become_rank(stage, items)
    else:
        become_launcher(stage, items, machine)


if __name__ == "__main__":
    main()
