"""The one Prefect task: bring one stage up to date.

Runs `dvc --wait-for-lock repro --single-item STAGE` as a child process and passes its output to Prefect's log. DVC is
the only cache, so the task is never cached; DVC alone decides what is out of date and what a stage needs.
"""

from __future__ import annotations

import heapq
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from prefect import State, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Cancelled

from tasks.running.places import RUNS, SCRATCH, place_of
from tasks.running.processes import die_with_parent
from tasks.running.record import read_run
from tasks.running.stage import WAITING_FILE

DVC_ADVICE = (
    "To track the changes",
    "git add ",
    "To enable auto staging",
    "dvc config core.autostage",
    "Use `dvc push`",
)
WAITING = "Waiting"  # name of the state of a task or flow that waits for people


class Seats:
    """Places for stages on the accelerators; of those that wait for one, the most urgent gets it, then the first."""

    def __init__(self, number: int) -> None:
        self._free = number
        self._waiting: list[tuple[int, int]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, urgency: int) -> Iterator[None]:
        """Wait for a seat, and hold it for as long as the block lasts."""
        with self._changed:
            own = -urgency, next(self._numbers)
            heapq.heappush(self._waiting, own)
            self._changed.wait_for(lambda: self._free > 0 and self._waiting[0] == own)
            heapq.heappop(self._waiting)
            self._free -= 1
            self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._free += 1
                self._changed.notify_all()


_children: set[subprocess.Popen[str]] = set()
_starting = threading.Lock()  # held while a child starts, so that `stop_all` overlooks none
_stopping = threading.Event()
_seats = Seats(1)  # two stages would share a machine's only accelerator


@task(cache_policy=NO_CACHE, task_run_name="{stage_name}")
def reproduce(stage_name: str, address: str, seat: str | None, urgency: int) -> str | State[Any]:
    """Bring one stage up to date; return "ran in N s", "restored" (from DVC's run cache) or "up to date".

    `address` is DVC's name for the stage. Of the stages whose `seat` is "accelerator", at most as many run at once as
    `allow_stages` was told, those of the greatest `urgency` first. A stage that waits for people ends in the state
    `Waiting` with the stage's line, so that stages that need it don't start.
    Raises RuntimeError with the stage's own message.
    """
    if seat == "accelerator":
        with _seats.taken(urgency):
            return _run_dvc(stage_name, address)
    return _run_dvc(stage_name, address)


def _run_dvc(stage_name: str, address: str) -> str | State[Any]:
    started = time.time()
    logger = get_run_logger()
    waiting = SCRATCH / place_of(stage_name) / WAITING_FILE
    waiting.unlink(missing_ok=True)  # left by an earlier run
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", address]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # dvc.yaml says `python`
    with _starting:
        if _stopping.is_set():
            raise RuntimeError(f"stage `{stage_name}` was not started: the flow is being stopped")
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            errors="replace",
            preexec_fn=die_with_parent,
            env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"},
        )
        _children.add(process)
    outcome = None
    last_lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.rstrip()
            if text.endswith("didn't change, skipping"):
                outcome = "up to date"
            elif text.endswith("is cached - skipping run, checking out outputs"):
                outcome = "restored"
            if text and not text.strip().startswith(DVC_ADVICE):
                logger.info(text)
                last_lines = [*last_lines[-4:], text]
        status = process.wait()
    finally:
        _children.discard(process)
    if status != 0 and waiting.exists():
        return Cancelled(name=WAITING, message=waiting.read_text(encoding="utf-8").strip())
    if status != 0:
        raise RuntimeError(f"stage `{stage_name}` failed: {failure(stage_name, started) or ' / '.join(last_lines)}")
    return outcome or f"ran in {time.time() - started:.0f} s"


def failure(stage_name: str, since: float) -> str | None:
    """Return how the stage failed, from the record that it opened after `since` (seconds since the epoch), or None.

    DVC passes on neither a stage's exit status nor its message.
    """
    for path in (RUNS / place_of(stage_name)).glob("*/run.json"):
        if path.stat().st_mtime < since:
            continue
        run = read_run(path.parent)
        if run["started"] >= since and run["status"] not in ("RUNNING", "FINISHED"):
            return str(run["error"] or run["status"])
    return None


def allow_stages(num_seats: int) -> None:
    """Let stages start, at most `num_seats` of them on the accelerators at once.

    A process that has stopped a flow must call it again before it runs another.
    """
    global _seats
    _seats = Seats(num_seats)
    _stopping.clear()


def stop_all(seconds: float = 25.0) -> None:
    """End every running stage with all its processes: terminated first, killed when the time is up.

    DVC dies of SIGTERM at once and leaves its child behind, so every process of the tree gets the signal.
    """
    import psutil

    with _starting:
        _stopping.set()
        children = list(_children)
    deadline = time.monotonic() + seconds
    descendants: list[psutil.Process] = []
    for child in children:
        with suppress(psutil.NoSuchProcess):  # it ended by itself in the meantime
            descendants += psutil.Process(child.pid).children(recursive=True)
        child.terminate()
    for process in descendants:
        with suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(descendants, timeout=seconds)
    for process in alive:
        process.kill()
    for child in children:  # with Popen, not psutil, which would collect the exit status in its place
        try:
            child.wait(timeout=max(1.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
