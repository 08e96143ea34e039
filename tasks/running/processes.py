"""Other processes: the pipeline that a stage belongs to, the workspace's lock, the parent that a process dies with."""

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
PIPELINE_ARGUMENT = "--pipeline="  # names the pipeline run to the ranks that a launcher starts, on any host
LAUNCHER_VARIABLE = "ARRIERO_LAUNCHER"  # process id of the launcher on this host, for the ranks that it starts
FINGERPRINT_ARGUMENT = "--fingerprint="  # tells ranks the stage's fingerprint, so that not each hashes all the data
THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
LOCKED_ARGUMENT = "--locked"  # tells ranks that a flow holds the workspace's lock for them

_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded here: a forked child must not import
_PR_SET_PDEATHSIG = 1


def argument(name: str) -> str | None:
    """Return what follows `name` on this process's command line, or None."""
    return next((given.removeprefix(name) for given in sys.argv[1:] if given.startswith(name)), None)


def pipeline_id() -> str:
    """Return the identity of the pipeline run that this process belongs to.

    The flow passes it in the environment, a launcher in an argument; under a plain `dvc repro` it is that of DVC's
    process, our parent.
    """
    if PIPELINE_VARIABLE in os.environ:
        return os.environ[PIPELINE_VARIABLE]
    told = argument(PIPELINE_ARGUMENT)
    if told is not None:
        return told
    import psutil

    parent = psutil.Process(os.getppid())
    return f"{parent.pid}-{int(parent.create_time())}"


def bypass_proxy() -> None:
    """Let this process and its children reach servers of this machine directly, whatever proxy is set."""
    for name in ("no_proxy", "NO_PROXY"):  # some libraries read the one, some the other
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, *THIS_MACHINE]))


@contextmanager
def pipeline_lock(owner: str) -> Iterator[None]:
    """Hold this workspace's lock, so that no other pipeline runs here, for as long as the block lasts.

    Raises ValueError, naming the holder, when another pipeline is running here.
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
            f"another pipeline is running in this workspace ({holder}): wait for it to end, or stop it, then try again"
        ) from None
    try:
        owner_file.write_text(f"{owner}, process {os.getpid()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def die_with_parent() -> None:
    """Ask Linux to send SIGTERM to this process when its parent dies, so that no stage outlives its pipeline."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.environ.get(LAUNCHER_VARIABLE, str(os.getppid())) != str(os.getppid()):
        sys.exit("the launcher died before this rank was ready")
