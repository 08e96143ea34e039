"""Who else runs: the pipeline that a stage belongs to, the workspace's lock, the parent that a process dies with."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.running.places import SCRATCH

PIPELINE_LOCK = SCRATCH / "pipeline.lock"
PIPELINE_VARIABLE = "ARRIERO_PIPELINE"  # names the flow run that a stage belongs to; set for child processes only
PIPELINE_ARGUMENT = "--pipeline="  # names the pipeline run to ranks that a launcher starts, on whatever host
LAUNCHER_VARIABLE = "ARRIERO_LAUNCHER"  # process id of the launcher on this host, for the ranks that it starts
FINGERPRINT_ARGUMENT = "--fingerprint="  # tells them the stage's, so that not every rank hashes all the data
LOCKED_ARGUMENT = "--locked"  # tells such ranks that a flow holds the workspace for them

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a forked child must not import
_PR_SET_PDEATHSIG = 1


def argument(name: str) -> str | None:
    """Return what this process's command line says after `name`, if it does."""
    return next((given.removeprefix(name) for given in sys.argv[1:] if given.startswith(name)), None)


def pipeline_id() -> str:
    """Return the identity of the pipeline run that this process belongs to.

    The flow names it in the environment, a launcher's command line in an argument; under a plain `dvc repro` it is
    DVC's process, our parent.
    """
    if PIPELINE_VARIABLE in os.environ:
        return os.environ[PIPELINE_VARIABLE]
    told = argument(PIPELINE_ARGUMENT)
    if told is not None:
        return told
    import psutil

    parent = psutil.Process(os.getppid())
    return f"{parent.pid}-{int(parent.create_time())}"


@contextmanager
def pipeline_lock(owner: str) -> Iterator[None]:
    """Hold this workspace's only place for a pipeline, for as long as the block lasts.

    Raises ValueError, naming who holds it, when another pipeline runs here.
    """
    from filelock import FileLock, Timeout

    SCRATCH.mkdir(exist_ok=True)
    owner_file = SCRATCH / "pipeline.json"
    lock = FileLock(PIPELINE_LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = owner_file.read_text(encoding="utf-8").strip() if owner_file.exists() else "an unknown process"
        raise ValueError(
            f"another pipeline runs in this workspace ({holder}): wait until it ends, or stop it, then start again"
        ) from None
    try:
        owner_file.write_text(f"{owner}, process {os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def die_with_parent() -> None:
    """Have Linux send SIGTERM to this process when its parent dies, so that no stage outlives its pipeline."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.environ.get(LAUNCHER_VARIABLE, str(os.getppid())) != str(os.getppid()):
        sys.exit("the launcher died before this rank was ready")
