from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import repro
from test_stage import processes_in, set_value, wait_for

from flows import states
from flows.servers import free_port
from tasks.publish import send_waiting_records
from tasks.running.places import SCRATCH
from tasks.running.processes import PIPELINE_VARIABLE
from tasks.running.record import metric_lines, open_record, read_run
from tasks.running.scratch import FINISHED, in_use, is_running, kept_states
from tasks.running.stage import put_in_place


def grow(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run stage `grow` as DVC would, but without DVC, which therefore never locks its output."""
    command = [sys.executable, "-m", "tasks.grow", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True)


def only_record() -> Path:
    (run,) = Path(".runs/grow").glob("*/run.json")
    return run.parent


def stop_half_way(workspace: Path) -> None:
    """Kill stage `grow` at some step of many."""
    set_value("seconds: 0.0", "seconds: 0.05")
    set_value("num_steps: 3 ", "num_steps: 200 ")
    stage = subprocess.Popen([sys.executable, "-m", "tasks.grow"])
    wait_for(lambda: bool(list(SCRATCH.glob("grow/*/state.txt"))))
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    wait_for(lambda: not processes_in(workspace))


def test_states_stay_until_dvc_holds_the_output(workspace: Path) -> None:
    grow()
    (state,) = SCRATCH.glob("grow/*/state.txt")
    assert (state.parent / FINISHED).exists()
    assert kept_states() == []  # nothing is left to do
    state.write_text("2")  # a sign by which the next run shows where it goes on from
    shutil.rmtree("data/grow")  # DVC was killed before it had locked the output: it removes it first
    assert repro("grow").returncode == 0
    record = only_record()
    assert [line["step"] for line in metric_lines(record)] == [3]  # nothing but the last step was done again
    assert state.exists()
    assert repro("shrink").returncode == 0
    assert not state.exists()  # the next stage found it in dvc.lock


def test_a_forced_run_begins_anew(workspace: Path) -> None:
    assert repro("grow").returncode == 0
    (state,) = SCRATCH.glob("grow/*/state.txt")
    state.write_text("2")
    assert repro("-f", "grow").returncode == 0
    record = only_record()
    assert [line["step"] for line in metric_lines(record)] == [1, 2, 3]


def test_a_stage_that_keeps_nothing_leaves_nothing(workspace: Path) -> None:
    assert repro("shrink").returncode == 0
    assert [path.name for path in (SCRATCH / "shrink").iterdir()] == ["running.lock"]


def test_what_runs_again_keeps_its_states(workspace: Path) -> None:
    assert repro("grow").returncode == 0
    with in_use(Path("grow")):
        assert repro("shrink").returncode == 0
        assert list(SCRATCH.glob("grow/*/state.txt"))
    assert not is_running(Path("grow"))


def test_a_stage_that_begins_anew_tells_of_its_other_states(workspace: Path) -> None:
    stop_half_way(workspace)
    (old,) = kept_states()
    assert old.stage == "grow"
    set_value("num_steps: 200", "num_steps: 4")
    result = grow()
    told = "grow: starts over: its code, data or parameters have changed since it was stopped and left\n"
    assert f"{told}  grow {old.fingerprint}  " in result.stderr
    assert f"python -m flows.states adopt grow {old.fingerprint}\n" in result.stderr
    set_value("num_steps: 4", "num_steps: 200")
    set_value("seconds: 0.05", "seconds: 0.0")
    result = grow()
    assert "starts over" in result.stderr  # another time of a step is another parameter, for DVC


def test_a_state_is_adopted_after_a_change_that_changes_no_result(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_half_way(workspace)
    (old,) = kept_states()
    step = int((old.directory / "state.txt").read_text())
    set_value("seconds: 0.05", "seconds: 0.0")
    assert states.main(["adopt", "grow", old.fingerprint]) == 0
    (new,) = kept_states()
    assert new.fingerprint != old.fingerprint
    assert states.main(["adopt", "grow", new.fingerprint]) == 1
    assert "resumes from .scratch/grow" in capsys.readouterr().err
    assert "starts over" not in grow().stderr
    record = Path(".runs/grow") / new.fingerprint
    assert [line["step"] for line in metric_lines(record)] == list(range(step + 1, 201))


def test_states_are_listed_and_cleared(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")  # nobody there
    assert states.main([]) == 0
    assert capsys.readouterr().out == "No stopped stage has left a state.\n"
    stop_half_way(workspace)
    (state,) = kept_states()
    assert states.main([]) == 0
    out = capsys.readouterr().out
    assert f"grow {state.fingerprint}  0.0 MiB, written 0 minutes ago\n" in out
    assert f".runs/grow/{state.fingerprint}  waits to be sent to MLflow: `dvc repro -f -s publish` sends it" in out
    for arguments, message in (
        (["clear", "shrink"], "`shrink` has left no state; grow has"),
        (["adopt", "grow", "0" * 16], f"`grow` has left no state {'0' * 16}"),
        (["forget"], "unknown command; usage:\n\n    python -m flows.states  "),
    ):
        assert states.main(arguments) == 1
        assert message in capsys.readouterr().err
    with in_use(Path("grow")):
        assert kept_states() == []
        for arguments in (["clear", "grow"], ["adopt", "grow", state.fingerprint]):
            assert states.main(arguments) == 1
            assert "`grow` is running" in capsys.readouterr().err
    assert states.main(["clear", "grow"]) == 0
    assert kept_states() == []


def test_ranks_take_the_fingerprint_from_their_launcher(workspace: Path) -> None:
    code = Path("tasks/grow.py").read_text()
    told = "    import sys\n    (stage.scratch.parent / f'rank{stage.rank}').write_text(f\"{'dvc' in sys.modules}\")\n"
    told += "    if stage.rank == 1:\n        return {}\n"
    Path("tasks/grow.py").write_text(code.replace("    state = ", told + "    state = ", 1))
    set_value("num_ranks: 1", "num_ranks: 2")
    subprocess.run([sys.executable, "-m", "tasks.workers.launch", "grow"], check=True, timeout=180)
    assert [(SCRATCH / "grow" / f"rank{rank}").read_text() for rank in (0, 1)] == ["False", "False"]
    assert json.loads(Path("data/grow/metrics.json").read_text()) == {"size": 3}


def test_the_rank_that_failed_first_is_named_while_rank_0_waits_for_all(workspace: Path) -> None:
    body = """
    import torch
    from model.network.ranks import join_ranks
    join_ranks()
    if stage.rank == 1:
        time.sleep(1)
        raise ValueError("a bad row")
    torch.distributed.all_reduce(torch.ones(1))
"""
    code = Path("tasks/grow.py").read_text()
    Path("tasks/grow.py").write_text(code.replace("    state = ", body + "    state = "))
    set_value("num_ranks: 1", "num_ranks: 2")
    command = [sys.executable, "-m", "tasks.workers.launch", "grow"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    launched = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180, env=environment)
    assert launched.returncode != 0
    assert "grow: rank 1: ValueError: a bad row\n" in launched.stderr
    record = only_record()
    run = read_run(record)
    assert (run["status"], run["error"]) == ("FAILED", "rank 1: ValueError: a bad row")
    assert "a bad row" in (record / "artifacts" / "traceback.txt").read_text()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs a second volume")
def test_an_output_reaches_another_volume(tmp_path: Path) -> None:
    other = Path("/dev/shm") / f"arriero-{os.getpid()}"
    assert tmp_path.stat().st_dev != other.parent.stat().st_dev
    try:
        for text in ("first", "second"):
            output = tmp_path / "output"
            output.mkdir()
            (output / "file.txt").write_text(text)
            put_in_place(output, other / "sft")
            assert (other / "sft" / "file.txt").read_text() == text
            assert not output.exists()
            assert [path.name for path in other.iterdir()] == ["sft"]
    finally:
        shutil.rmtree(other, ignore_errors=True)


def test_publish_leaves_a_stage_alone_that_runs(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PIPELINE_VARIABLE, "flow-7")
    records = []
    for name in ("study", "sft"):
        record = Path(".runs") / name / ("0" * 16)
        record.mkdir(parents=True)
        header = {
            "stage": name, "fingerprint": "0" * 16, "pipeline": "flow-7", "experiment": "test", "params": {},
            "datasets": [], "code": {"commit": "", "changed": "false"}, "output": f"data/{name}",
        }  # fmt: skip
        open_record(record, header)
        records.append(record)
    study, sft = records
    with in_use(Path("study")):
        send_waiting_records(Path(".runs/publish"))
        assert read_run(study)["status"] == "RUNNING"
        assert not sft.exists()  # it was killed, and MLflow has been told
    send_waiting_records(Path(".runs/publish"))
    assert not study.exists()


def test_a_record_that_a_power_cut_has_emptied_is_named(workspace: Path) -> None:
    set_value("fail_at: null", "fail_at: 2")
    assert repro("grow").returncode != 0
    record = only_record()
    (record / "run.json").write_text("")
    result = repro("grow")
    assert result.returncode != 0
    assert f"grow: {record}/run.json is damaged (" in result.stderr
    assert f"perhaps by a power cut: delete `{record}` and run again" in result.stderr
    shutil.rmtree(record)
    set_value("fail_at: 2", "fail_at: null")
    assert repro("grow").returncode == 0
