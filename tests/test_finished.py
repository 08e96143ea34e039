import subprocess
import sys
from pathlib import Path

import pytest

from tasks.workers.finished import finish_once, link

SLOW = """
import sys, time
from pathlib import Path
from tasks.workers.finished import finish_once

def fill(directory):
    (directory / "first").write_text("1")
    print("half", flush=True)
    time.sleep(60)

finish_once(Path(sys.argv[1]), fill)
"""


def fill(directory: Path) -> None:
    (directory / "first").write_text("1")
    (directory / "second").write_text("2")


def names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    finish_once(tmp_path / "piece", fill)
    before = (tmp_path / "piece" / "first").stat()
    finish_once(tmp_path / "piece", fill)
    assert (tmp_path / "piece" / "first").stat().st_ino == before.st_ino
    assert names(tmp_path) == ["piece/first", "piece/second"]


def test_a_piece_whose_worker_was_killed_is_not_there_and_is_done_anew(tmp_path: Path) -> None:
    command = [sys.executable, "-c", SLOW, str(tmp_path / "piece")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.kill()
    assert not (tmp_path / "piece").exists()
    finish_once(tmp_path / "piece", fill)
    assert names(tmp_path / "piece") == ["first", "second"]


def test_a_piece_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        (directory / "first").write_text("1")
        raise ValueError("a rule is wrong")

    with pytest.raises(ValueError, match="a rule is wrong"):
        finish_once(tmp_path / "piece", fail)
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_do_the_same_piece_the_first_to_end_wins(tmp_path: Path) -> None:
    def late(directory: Path) -> None:
        finish_once(tmp_path / "piece", fill)  # the other one, meanwhile
        (directory / "first").write_text("late")

    finish_once(tmp_path / "piece", late)
    assert (tmp_path / "piece" / "first").read_text() == "1"
    assert names(tmp_path) == ["piece/first", "piece/second"]


def test_a_linked_file_is_the_same_file_and_a_copy_on_another_file_system(tmp_path: Path) -> None:
    (tmp_path / "source").write_text("text")
    link(tmp_path / "source", tmp_path / "target")
    assert (tmp_path / "target").stat().st_ino == (tmp_path / "source").stat().st_ino
    elsewhere = Path("/dev/shm")
    if not elsewhere.is_dir() or elsewhere.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    target = elsewhere / f"{tmp_path.parent.name}-{tmp_path.name}"
    try:
        link(tmp_path / "source", target)
        assert target.read_text() == "text"
    finally:
        target.unlink(missing_ok=True)
