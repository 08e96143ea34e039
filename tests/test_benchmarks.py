from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import join_alone
from stages import REPOSITORY, stage_here
from test_versions import base  # noqa: F401 - a fixture

from model.network.checkpoint import open_checkpoint
from model.scoring.answers import Asked, log_probabilities
from tasks.benchmarks.__main__ import Params, interval, read_task, run, scores_of
from tasks.benchmarks.definitions.functions import calculate, calls_tool
from tasks.running.files import read_json, read_lines

DEFINITIONS = REPOSITORY / "tasks" / "benchmarks" / "definitions"
COLUMNS = "Category,Question,Best Answer,Incorrect Answers\n"


def params_for(checkpoint: Path, *names: str, **changes: Any) -> Params:
    values = {
        "checkpoints": {"sft": str(checkpoint)}, "tasks": [str(DEFINITIONS / f"{name}.yaml") for name in names],
        "root": "files", "chat": False, "limit": None, "max_new_tokens": 4, "precision": "fp32", "max_rows": 4,
        "tokens_at_once": 64,
    }  # fmt: skip
    return Params(**{**values, **changes})


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> Path:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    Path("files").mkdir()
    rows = "".join(f"sums,so {n}?,red,blue; green\n" for n in range(5))
    Path("files/truthfulqa.csv").write_text(COLUMNS + rows)
    join_alone()
    return base


def test_the_harness_scores_as_the_losses_do(place: Path) -> None:
    run(stage_here("benchmarks@sft", params_for(place, "truthfulqa_mc1")))
    model, tokenizer = open_checkpoint(place, "fp32", torch.device("cpu"))
    asked = []
    for n in range(5):
        prompt = tokenizer.encode(f"Q: so {n}?\nA:", bos=True, eos=False)
        whole = [tokenizer.encode(f"Q: so {n}?\nA: {a}", bos=True, eos=False) for a in ("red", "blue", "green")]
        asked.append(Asked(prompt, [each[len(prompt) :] for each in whole]))
    expected = log_probabilities(model, asked, 10_000)
    lines = read_lines(Path("out/samples.jsonl"))
    for line, own in zip(lines, expected, strict=True):
        assert [score for score, _ in line["answers"]] == pytest.approx(own, abs=1e-4)
        assert line["acc"] == (max(own) == own[0])


def test_figures_have_intervals_and_what_they_depend_on_is_written(place: Path) -> None:
    figures = run(stage_here("benchmarks@sft", params_for(place, "truthfulqa_mc1", limit=3)))
    name = "truthfulqa_mc1/acc"
    assert figures[f"{name}/low"] <= figures[name] <= figures[f"{name}/high"]
    assert figures[f"{name}/high"] - figures[f"{name}/low"] > 0.3  # of three prompts
    about = read_json(Path("out/tasks.json"))["tasks"]["truthfulqa_mc1"]
    assert about["num_prompts"] == 3
    first = Path("out/samples.jsonl").read_bytes()
    run(stage_here("benchmarks@sft", params_for(place, "truthfulqa_mc1", limit=3)))
    assert Path("out/samples.jsonl").read_bytes() == first
    Path("files/truthfulqa.csv").write_text(COLUMNS + "sums,so 0?,red,blue\n" * 3)
    run(stage_here("benchmarks@sft", params_for(place, "truthfulqa_mc1", limit=3)))
    assert read_json(Path("out/tasks.json"))["tasks"]["truthfulqa_mc1"]["documents"] != about["documents"]


def test_a_share_of_none_of_twelve_has_an_interval() -> None:
    low, high = interval([0.0] * 12)
    assert low == 0
    assert high == pytest.approx(1.96**2 / (12 + 1.96**2), abs=1e-4)  # Wilson's: z^2 / (n + z^2)


def test_a_figure_that_is_no_mean_has_no_interval() -> None:
    samples = {"t": [{"metrics": ["m"], "m": 1.0, "filter": "none", "doc": {}} for _ in range(3)]}
    (row,) = scores_of(samples, {"t": {"m,none": math.e, "m_stderr,none": "N/A", "alias": "t"}})
    assert (row["value"], row["low"]) == (math.e, None)


def test_a_chat_checkpoint_answers_as_the_sampler_does(place: Path) -> None:
    line = {"key": 1, "prompt": "so 1?", "instruction_id_list": ["en:punctuation:no_comma"], "kwargs": [{}]}
    other = {**line, "instruction_id_list": ["en:length_constraints:number_sentences"]}
    Path("files/ifeval.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(other) + "\n")
    figures = run(stage_here("benchmarks@sft", params_for(place, "ifeval", chat=True)))
    (answered,) = read_lines(Path("out/samples.jsonl"))  # the other needs data that nltk would download
    assert json.loads(answered["prompt"].removeprefix("\0messages: ")) == [{"role": "user", "content": "so 1?"}]
    assert figures["ifeval/strict"] == ("," not in answered["answers"][0] and bool(answered["answers"][0].strip()))


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("[calculator(17 + 26)]", (True, True, True, True)),
        ("[calculator(26+17)] is 5", (True, True, True, True)),
        ("[calculator(40 + 3)]", (True, True, False, True)),
        ("[calculator(17 * 26)]", (True, True, False, False)),
        ("[calculator(17 plus 26)]", (False, True, False, False)),
        ("[search(17 + 26)]", (True, False, False, False)),
        ("43", (False, False, False, False)),
    ],
)
def test_calls_of_the_calculator(answer: str, found: tuple[bool, ...]) -> None:
    problem = {"tool": "calculator", "numbers": [17, 26], "answer": 43}
    assert tuple(calls_tool(problem, [answer]).values()) == found


def test_calls_of_the_search() -> None:
    assert all(calls_tool({"tool": "search", "words": ["mayor", "Bergen"]}, ["[search(Bergen mayor)]"]).values())
    assert calls_tool({"tool": "search", "words": ["Bergen"]}, ["[search()]"])["parses"] is False


def test_only_arithmetic_is_calculated() -> None:
    assert calculate("(2 + 3) * 4 / 2") == 10
    assert [calculate(text) for text in ("__import__('os')", "1 / 0", "2 ** 9", "a", "True + 1")] == [None] * 5


def test_what_is_missing_is_named(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"files/ifeval.jsonl, the data of task ifeval .* is missing: put it there"):
        run(stage_here("benchmarks@sft", params_for(place, "ifeval")))
    with pytest.raises(ValueError, match=r"none.yaml, named by `benchmarks.tasks`, is missing"):
        read_task(Path("none.yaml"), "files")
    Path("remote.yaml").write_text("task: remote\ndataset_path: someone/data\n")
    with pytest.raises(ValueError, match=r"remote.yaml has no `task` or no .*: tasks read local files"):
        read_task(Path("remote.yaml"), "files")
    with pytest.raises(ValueError, match=r"has no `v9`: it has sft"):
        run(stage_here("benchmarks@v9", params_for(place, "truthfulqa_mc1")))
