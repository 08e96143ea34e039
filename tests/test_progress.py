from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import pytest
import tqdm.std

from model.progress.bar import progress_bar


class Clock:
    """Seconds that pass when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines_of(text: str) -> list[str]:
    return [line for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tqdm.std, "time", clock)
    return clock


def write_bar(clock: Clock, seconds: int) -> None:
    """Ten units a second, as sampling finishes its responses."""
    with progress_bar(10 * seconds, "sampling", "response") as bar:
        for _ in range(10 * seconds):
            clock.now += 0.1
            bar.set_postfix(tokens_per_second="900", refresh=False)
            bar.update()


def test_in_a_log_a_bar_writes_a_line_every_ten_seconds_and_a_last_one(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as pipe:
        monkeypatch.setattr(sys, "stderr", pipe)
        write_bar(clock, seconds=64)
    with os.fdopen(reading) as pipe:
        lines = lines_of(pipe.read())
    assert 2 + 5 <= len(lines) <= 2 + 6  # as it begins, every ten seconds, and the last
    assert "0/640" in lines[0] and "640/640" in lines[-1]


def test_on_a_terminal_a_bar_moves(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    write_bar(clock, seconds=8)
    assert len(lines_of(terminal.getvalue())) > 40


def test_a_bar_begins_where_a_resumed_run_does_and_one_without_a_name_is_not_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with progress_bar(8, "sft", "step", done=3) as bar:
        bar.update()
    assert "3/8" in capsys.readouterr().err
    assert bar.n == 4
    with progress_bar(8, None, "step") as bar:
        bar.update()
    assert capsys.readouterr().err == ""


def test_a_bar_needs_no_torch() -> None:
    program = "import sys, model.progress.bar; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "False\n"
    )
