from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import repro
from pydantic import Field

from tasks.running import record as record_module
from tasks.running import stage as stage_module
from tasks.running.fingerprint import fingerprint
from tasks.running.params import Machine, Section, flatten, parse_section, read_params
from tasks.running.processes import pipeline_lock
from tasks.running.record import metric_lines
from tasks.running.stage import Stage


class Inner(Section):
    width: int = Field(gt=0, description="columns")


class Outer(Section):
    learning_rate: float = Field(gt=0, le=1, description="peak, a step")
    inner: Inner
    sources: dict[str, Inner]


GOOD = {"learning_rate": 0.1, "inner": {"width": 1}, "sources": {"a": {"width": 2}}}


def test_a_section_is_parsed_and_frozen() -> None:
    parsed = parse_section(Outer, {"outer": GOOD}, "outer")
    assert parsed.sources["a"].width == 2
    with pytest.raises(ValueError, match="frozen"):
        parsed.learning_rate = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rat": 1}, r"`outer.learning_rat` is not a parameter; did you mean `outer.learning_rate`\?"),
        ({"zzz": 1}, r"`outer.zzz` is not a parameter; known here: learning_rate, inner, sources"),
        ({"learning_rate": -1}, r"`outer.learning_rate` is -1: Input should be greater than 0 \(peak, a step\)"),
        ({"learning_rate": float("nan")}, r"`outer.learning_rate` is nan: .*finite number"),
        (
            {"inner": {"widht": 3, "width": 1}},
            r"`outer.inner.widht` is not a parameter; did you mean `outer.inner.width`\?",
        ),
        ({"inner": {}}, r"`outer.inner.width` is missing"),
        ({"sources": {"a": {"width": 0}}}, r"`outer.sources.a.width` is 0: .*greater than 0 \(columns\)"),
    ],
)
def test_a_wrong_value_is_explained(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_section(Outer, {"outer": {**GOOD, **change}}, "outer")


def test_a_missing_section_names_the_near_match() -> None:
    with pytest.raises(ValueError, match=r"section `outer` is missing; did you mean to rename `outre`\?"):
        parse_section(Outer, {"outre": GOOD}, "outer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"params.yaml is missing: run from the project's root"),
        ("a: [1", r"params.yaml is not valid YAML"),
        ("- 1\n", r"params.yaml holds list, not sections"),
    ],
)
def test_a_bad_params_file_is_explained(
    text: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("params.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_params()


def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_text("rate: 2e-5\nname: yes\n")
    assert read_params() == {"rate": 2e-5, "name": "yes"}


def test_parameters_are_flattened_to_dotted_names() -> None:
    assert flatten({"sft": {"epochs": 2, "mix": {"own": 0.5}}, "seed": 1}) == {
        "sft.epochs": 2,
        "sft.mix.own": 0.5,
        "seed": 1,
    }


def make_stage(path: Path) -> Stage[Inner]:
    machine = Machine(threads=1, workers=1, scheduler=None, num_ranks=1, hostfile=None, num_seats=1)
    return Stage("toy", Inner(width=1), 1, machine, path, path, path)


def test_metrics_logged_again_after_resuming_are_left_out(tmp_path: Path) -> None:
    stage = make_stage(tmp_path)
    for step in (1, 2, 2, 1, 3):
        stage.log({"loss": step}, step=step, tokens=step * 10)
    assert [(line["step"], line["tokens"], line["metrics"]) for line in metric_lines(tmp_path)] == [
        (1, 10, {"loss": 1.0}),
        (2, 20, {"loss": 2.0}),
        (3, 30, {"loss": 3.0}),
    ]


def test_a_line_cut_off_by_a_kill_is_left_out(tmp_path: Path) -> None:
    make_stage(tmp_path).log({"loss": 1}, step=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "metr')
    assert [line["step"] for line in metric_lines(tmp_path)] == [1]


def test_a_line_cut_off_does_not_spoil_the_next(tmp_path: Path) -> None:
    record_module.open_record(tmp_path, {})
    make_stage(tmp_path).log({"loss": 1}, step=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "metr')  # the disk was full, or the machine stopped
    record_module.open_record(tmp_path, {})
    make_stage(tmp_path).log({"loss": 2}, step=2)
    assert [line["step"] for line in metric_lines(tmp_path)] == [1, 2]


def test_a_metric_that_is_no_number_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metric `loss` is 'high': only numbers can be logged"):
        make_stage(tmp_path).log({"loss": "high"}, step=1)  # type: ignore[dict-item]


@pytest.mark.parametrize("name", ["a//b", "validation/Coding & debugging/loss"])
def test_a_metric_whose_name_mlflow_refuses_is_our_mistake(tmp_path: Path, name: str) -> None:
    with pytest.raises(AssertionError, match=r"MLflow does not accept the metric `.*`: make its name with metric_name"):
        make_stage(tmp_path).log({name: 1.0}, step=1)
    stage = make_stage(tmp_path)
    with pytest.raises(
        AssertionError, match=r"MLflow does not accept the metrics \['.*'\]: make their names with metric_name"
    ):
        stage_module._publish_output(stage, {name: 1.0})


def test_only_the_first_rank_logs(tmp_path: Path) -> None:
    stage = make_stage(tmp_path)
    stage.rank = 1
    stage.log({"loss": 1}, step=1)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_second_pipeline_in_the_workspace_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = "from tasks.running.processes import pipeline_lock\nwith pipeline_lock('flow run x'): pass"
    with pipeline_lock("flow run first"):
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert f"another pipeline is running in this workspace (flow run first, process {os.getpid()})" in result.stderr
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_the_fingerprint_changes_with_what_dvc_compares_only(workspace: Path) -> None:
    before, params, data = fingerprint("grow")
    assert params == {"machine.num_ranks": 1, "seed": 1, "grow.num_steps": 3, "grow.seconds": 0.0, "grow.fail_at": None}
    assert data == []
    Path("notes.txt").write_text("no dependency")
    assert fingerprint("grow")[0] == before
    params = Path("params.yaml")
    params.write_text(params.read_text().replace("num_steps: 3", "num_steps: 4"))
    with_other_params = fingerprint("grow")[0]
    assert with_other_params != before
    code = Path("tasks/grow.py")
    code.write_text(code.read_text() + "\n# changed\n")
    assert fingerprint("grow")[0] not in (before, with_other_params)
    with pytest.raises(ValueError, match=r"dvc.yaml's stage `grwo` can't be read"):
        fingerprint("grwo")


def test_data_is_what_a_stage_reads_that_is_no_code(workspace: Path) -> None:
    Path("tasks/shrink").mkdir()
    Path("tasks/shrink/__main__.py").write_text("")
    Path("data/grow").mkdir(parents=True)
    Path("data/grow/grown.txt").write_text("")
    text = Path("dvc.yaml").read_text()
    Path("dvc.yaml").write_text(text.replace("- tasks/shrink.py", "- tasks/shrink.py\n    - tasks/shrink"))
    *_, data = fingerprint("shrink")
    assert [dataset["path"] for dataset in data] == ["data/grow"]


def set_value(old: str, new: str) -> None:
    params = Path("params.yaml")
    assert old in params.read_text()
    params.write_text(params.read_text().replace(old, new))


def test_a_wrong_seed_is_explained(workspace: Path) -> None:
    set_value("seed: 1", "seed: -1")
    assert "grow: params.yaml: `seed` is -1: an integer >= 0 is needed" in repro("grow").stderr


def test_a_failed_stage_says_why_and_leaves_no_output(workspace: Path) -> None:
    set_value("fail_at: null", "fail_at: 2")
    result = repro("grow")
    assert result.returncode != 0
    assert "grow: grow.fail_at: step 2 was told to fail" in result.stderr
    assert "Traceback" not in result.stderr
    assert not Path("data/grow").exists()
    (record,) = Path(".runs/grow").glob("*/run.json")
    run = json.loads(record.read_text())
    assert run["status"] == "FAILED"
    assert "step 2" in run["error"]


def wait_for(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.1)


def processes_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cwd", "pid", "status", "cmdline"]):
        if process.info["cwd"] == str(folder) and process.pid != os.getpid() and process.info["status"] != "zombie":
            found.append(process)
    return found


SLOW = [pytest.param(how, marks=pytest.mark.slow) for how in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("how", [*SLOW, signal.SIGKILL])
def test_killing_dvc_ends_the_stage_and_the_next_run_resumes(workspace: Path, how: signal.Signals) -> None:
    set_value("seconds: 0.0", "seconds: 0.3")
    set_value("num_steps: 3", "num_steps: 12")
    dvc = subprocess.Popen([sys.executable, "-m", "dvc", "repro", "grow"], start_new_session=True)
    wait_for(lambda: any(len(list(metric_lines(path))) >= 3 for path in Path(".runs/grow").glob("*")))
    os.killpg(dvc.pid, how) if how == signal.SIGINT else dvc.send_signal(how)
    dvc.wait(timeout=180)
    wait_for(lambda: not processes_in(workspace))
    assert not Path("data/grow").exists()
    (record,) = Path(".runs/grow").glob("*/run.json")
    assert json.loads(record.read_text())["status"] == "KILLED"
    steps_before = len(list(metric_lines(record.parent)))
    assert repro("grow").returncode == 0
    assert Path("data/grow/grown.txt").read_text() == "12 1\n"
    lines = list(metric_lines(record.parent))
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert 3 <= steps_before < 12
    assert repro("shrink").returncode == 0
    assert not list(Path(".scratch/grow").glob("*/state.txt"))


def test_a_full_disk_gives_one_message() -> None:
    error = OSError(28, "No space left on device", "data/grow/big.bin")
    assert stage_module.full_disk(error) == (
        "the disk is full (writing data/grow/big.bin): free space and run again; earlier results are untouched"
    )


def test_a_disk_that_is_full_ends_the_stage_with_this_message(workspace: Path) -> None:
    code = Path("tasks/grow.py").read_text().replace('(stage.output / "grown.txt").write', 'Path("/dev/full").write')
    Path("tasks/grow.py").write_text("from pathlib import Path\n" + code)
    result = repro("grow")
    assert result.returncode != 0
    assert "grow: the disk is full (writing the output): free space and run again" in result.stderr
    assert "Traceback" not in result.stderr
    assert not Path("data/grow").exists()


def test_a_stage_whose_second_rank_fails_has_failed(workspace: Path) -> None:
    body = """
    ready = stage.scratch / "ready"
    if stage.rank == 1:
        while not ready.exists():
            time.sleep(0.01)
        raise ValueError("a bad row")
    ready.touch()
    time.sleep(120)
"""
    code = Path("tasks/grow.py").read_text()
    Path("tasks/grow.py").write_text(code.replace("    state = ", body + "    state = "))
    set_value("num_ranks: 1", "num_ranks: 2")
    launched = subprocess.run([sys.executable, "-m", "tasks.workers.launch", "grow"], check=False, timeout=180)
    assert launched.returncode != 0
    (record,) = Path(".runs/grow").glob("*/run.json")
    values = json.loads(record.read_text())
    assert (values["status"], values["error"]) == ("FAILED", "rank 1: ValueError: a bad row")
    assert "a bad row" in (record.parent / "artifacts" / "traceback.txt").read_text()


@pytest.mark.parametrize(("failure", "status"), [("pass", 0), ("raise ValueError('odd')", 1), ("raise TypeError", 1)])
def test_what_python_does_at_its_end_changes_no_ranks_status(workspace: Path, failure: str, status: int) -> None:
    code = Path("tasks/grow.py").read_text()
    aborting = f"    import atexit, os\n    atexit.register(os.abort)\n    {failure}\n"
    Path("tasks/grow.py").write_text(code.replace("    state = ", aborting + "    state = ", 1))
    launched = subprocess.run(
        [sys.executable, "-m", "tasks.workers.launch", "grow"], capture_output=True, text=True, check=False, timeout=180
    )
    assert launched.returncode == status
    assert ("Traceback" in launched.stderr) == ("TypeError" in failure)
