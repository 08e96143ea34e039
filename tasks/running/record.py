"""What happened: the record of a stage's run in .runs/<stage>/<fingerprint>/, which is sent to MLflow.

run.json says what ran and how it ended, metrics.jsonl holds every logged metric, artifacts/ and tables/ hold what
MLflow shows. A stage never talks to MLflow itself: a process beside it sends the record (tasks/steering/tracking.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tasks.running.files import read_json, write_json


def metric_lines(record: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of a record's metrics.jsonl, without one that a kill has cut off."""
    path = record / "metrics.jsonl"
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def read_run(record: Path) -> dict[str, Any]:
    """Return what a record says about its run. Raises ValueError, naming the file, when it is damaged."""
    run: dict[str, Any] = read_json(record / "run.json")
    return run


def open_record(record: Path, header: Mapping[str, Any]) -> None:
    """Open the record for a first or a resumed run; the record of a finished run is replaced."""
    path = record / "run.json"
    now = begun = time.time()
    if path.exists():
        before = read_run(record)
        if before["status"] == "FINISHED":
            shutil.rmtree(record)
        else:
            begun = before["begun"]
    metrics = record / "metrics.jsonl"
    if metrics.exists():  # a line that was cut off would swallow the next one
        os.truncate(metrics, metrics.read_bytes().rfind(b"\n") + 1)
    write_json(path, {**header, "status": "RUNNING", "begun": begun, "started": now, "error": None})


def close_record(record: Path, status: str, error: str | None = None, trace: str | None = None) -> None:
    """Record how the run ended; MLflow gets what the record says."""
    path = record / "run.json"
    values = read_run(record)
    if trace is not None:
        (record / "artifacts").mkdir(exist_ok=True)
        (record / "artifacts" / "traceback.txt").write_text(trace, encoding="utf-8")
    write_json(path, {**values, "status": status, "error": error, "ended": time.time()})


def in_repository() -> bool:
    """Return whether the working directory is in a git repository; a downloaded archive is in none."""
    return any((folder / ".git").exists() for folder in (Path.cwd(), *Path.cwd().parents))


def code_revision() -> dict[str, str]:
    """Return the current git commit, and whether files differ from it; both unknown without git or a repository."""
    if shutil.which("git") is None or not in_repository():
        return {"commit": "unknown", "changed": "unknown"}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=False
    )
    return {"commit": commit.stdout.strip(), "changed": str(bool(changed.stdout.strip())).lower()}


def start_sender(record: Path) -> subprocess.Popen[bytes]:
    """Start the process that sends the record to MLflow; it ends by itself when our end of its pipe closes."""
    command = [sys.executable, "-m", "tasks.steering.tracking", str(record), repr(read_run(record)["started"])]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


def end_sender(sender: subprocess.Popen[bytes]) -> None:
    """Tell the sender that the stage has ended, and wait for it."""
    assert sender.stdin is not None
    sender.stdin.close()
    try:
        sender.wait(timeout=60)
    except subprocess.TimeoutExpired:
        sender.kill()
        sys.stderr.write("MLflow is too slow; the record stays in .runs/, and the next `publish` sends it\n")
