"""What make does beside starting programs; in a folder with our Makefile and an environment that only notes calls."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from stages import REPOSITORY

from flows.servers import free_port


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh clone whose environment has one program, which is slow, notes what it was called with, and fails none."""
    monkeypatch.chdir(tmp_path)
    for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):  # of a make that started the tests
        monkeypatch.delenv(name, raising=False)
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(REPOSITORY / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    program = tmp_path / ".venv/bin/python"
    program.write_text('#!/bin/sh\necho "$@" >> calls\nsleep 0.5\n')
    program.chmod(0o755)
    return tmp_path


def make(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(["make", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_two_setups_at_once_set_up_once(clone: Path) -> None:
    both = [make("setup"), make("setup")]
    assert [(process.communicate(timeout=60)[0], process.returncode) for process in both] == [("", 0), ("", 0)]
    upgrade, install = Path("calls").read_text().splitlines()
    assert upgrade.endswith("install --quiet --quiet --upgrade pip")
    assert install.endswith("--constraint constraints.txt --editable .[dev]")
    assert make("setup").wait(timeout=60) == 0
    os.utime("constraints.txt", (2**32, 2**32))  # a new version
    assert make("setup").wait(timeout=60) == 0
    assert len(Path("calls").read_text().splitlines()) == 4


def test_a_setup_that_fails_is_no_setup(clone: Path) -> None:
    Path(".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
    assert make("run").wait(timeout=60) != 0
    assert not Path(".venv/.ready").exists()


def test_clean_keeps_states_and_records_and_says_so(clone: Path) -> None:
    assert make("clean").communicate(timeout=60) == ("", None)
    for name in (
        ".scratch/sft/0123/resume/step-4/model.pt",
        ".runs/sft/0123/run.json",
        ".ruff_cache/x",
        ".hypothesis/x",
    ):
        (clone / name).parent.mkdir(parents=True)
        (clone / name).write_bytes(bytes(10**6))
    said, _ = make("clean").communicate(timeout=60)
    states, records = said.splitlines()
    assert states.startswith("left: .scratch (") and "python -m flows.states" in states
    assert records.startswith("left: .runs (") and "dvc repro -f -s publish" in records
    assert Path(".scratch/sft/0123/resume/step-4/model.pt").exists() and Path(".runs/sft/0123/run.json").exists()
    assert not Path(".ruff_cache").exists() and not Path(".hypothesis").exists()


@pytest.mark.slow
def test_deploy_says_that_no_server_answers(clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    monkeypatch.setenv("PREFECT_HOME", str(clone / "prefect"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # the real prefect
    process = make("deploy", "SECONDS_TO_ANSWER=1")
    said, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"No Prefect server answers at {os.environ['PREFECT_API_URL']}: start one with make ui" in said


def plain(text: str) -> str:
    """A command without the folders of its paths."""
    return " ".join(re.sub(r"\S*/", "", text).split())


def test_ci_runs_every_command_of_the_readme() -> None:
    readme, ci = ((REPOSITORY / name).read_text() for name in ("README.md", ".ci/run"))
    blocks = [
        line.partition("#")[0]
        for block in re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
        for line in block.splitlines()
    ]
    inline = re.findall(r"`((?:make|dvc|python -m) [^`]+)`", readme)
    commands = {plain(part) for text in [*blocks, *inline] for part in re.split("&+", text)}
    assert {command for command in commands if command not in plain(ci.replace("\\\n", " "))} == set()
    assert len(commands) > 12
