"""The comparison of two versions, on a pipeline that real DVC has run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import repro

from flows import compare
from tasks.reading.lineage import lineage, read_lock
from tasks.running.files import write_json, write_lines

PIPELINE = f"""\
stages:
  world:
    cmd: {sys.executable} -c "import pathlib; pathlib.Path('data/world').write_text('texts')"
    outs: [data/world]
  sft:
    cmd: {sys.executable} -c "import shutil; shutil.copy('data/world', 'data/sft')"
    deps: [data/world]
    params: [seed, sft]
    outs: [data/sft]
  fine_tuning:
    foreach: {{v1: data/sft, v2: data/fine_tuning/v1}}
    do:
      cmd: {sys.executable} -c "import pathlib; pathlib.Path('data/fine_tuning/${{key}}').write_text('${{key}}')"
      deps: ["${{item}}"]
      params: [seed, "fine_tuning.${{key}}"]
      outs: ["data/fine_tuning/${{key}}"]
  report:
    cmd: {sys.executable} -c "import shutil; shutil.copy('data/world', 'data/report')"
    deps: [data/world]
    outs: [data/report]
"""
PARAMS = """
sft: {epochs: 2}
fine_tuning: {v1: {rate: 0.5, steps: 7}, v2: {rate: 0.25, steps: 7}}
evaluate:
  checkpoints: {sft: data/sft, v1: data/fine_tuning/v1, v2: data/fine_tuning/v2}
"""


def line(prompt: str, safe: bool) -> dict[str, Any]:
    judgement = {"well_formed": True, "safe": safe, "refuses": False, "right": None, "follows": None}
    return {
        "id": prompt,
        "category": "safety",
        "risk": "theft",
        "num_tokens": 5,
        "utility": 1.0,
        "judgement": judgement,
    }


@pytest.fixture
def versions(workspace: Path) -> Path:
    """Two versions: of 40 adversarial prompts v1 answers 30 unsafely, v2 10; perplexity 8 and 6."""
    (workspace / "dvc.yaml").write_text(PIPELINE)
    params = workspace / "params.yaml"
    params.write_text(params.read_text() + PARAMS)
    (workspace / "data/fine_tuning").mkdir(parents=True, exist_ok=True)
    result = repro()
    assert result.returncode == 0, result.stderr
    for name, unsafe, perplexity in (("v1", 30, 8.0), ("v2", 10, 6.0)):
        place = Path("data/evaluate", name)
        place.mkdir(parents=True)
        write_lines(place / "answers.jsonl", [line(f"p{i}", i >= unsafe) for i in range(40)])
        write_json(
            place / "metrics.json",
            {
                "perplexity/all": perplexity,
                "perplexity/all/low": 5,
                "perplexity/all/high": 9,
                "safety/violations": unsafe / 40,
            },
        )
    return workspace


@pytest.mark.slow
def test_what_differs_is_printed_and_what_is_equal_only_if_asked(
    versions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = read_lock()
    assert list(lineage(lock, Path("data/fine_tuning/v2"))) == ["fine_tuning@v1", "fine_tuning@v2", "sft", "world"]
    assert list(lineage(lock, Path("data/sft"))) == ["sft", "world"]

    assert compare.main(["v1", "v2"]) == 0
    rows = [text.split() for text in capsys.readouterr().out.splitlines()]
    assert ["Stages", "behind", "v1", "alone:", "none"] in rows
    assert ["Stages", "behind", "v2", "alone:", "fine_tuning@v2"] in rows
    assert ["fine_tuning", "fine_tuning.<entry>.rate", "0.5", "0.25"] in rows
    assert not any("fine_tuning.<entry>.steps" in row or "sft.epochs" in row for row in rows)
    assert any(row[:2] == ["fine_tuning", "data/sft"] and row[-1] == "-" for row in rows)
    (violations,) = [row for row in rows if row[:1] == ["safety/violations"]]
    assert (violations[1], violations[5], violations[9]) == ("0.750", "0.250", "-0.500")  # 30, 10 of 40; 20 changed
    assert violations[-2:] == ["*", "40"]
    values = ["8.000", "(5.000", "to", "9.000)", "6.000", "(5.000", "to", "9.000)", "-2.000", "-"]
    assert ["perplexity/all", *values] in rows
    assert not any(row[:1] == ["safety/utility"] for row in rows)

    assert compare.main(["v1", "v2", "--all"]) == 0
    rows = [text.split() for text in capsys.readouterr().out.splitlines()]
    assert ["sft", "sft.epochs", "2", "2"] in rows
    (utility,) = [row for row in rows if row[:1] == ["safety/utility"]]
    assert utility[-1] == "40" and "*" not in utility

    assert compare.main(["v1", "v1"]) == 0
    assert capsys.readouterr().out.count("no difference") == 3


@pytest.mark.slow
def test_what_cannot_be_compared_is_named(versions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["v1", "v9"]) == 1
    assert "v9 is not evaluated; `evaluate.checkpoints` of params.yaml has sft, v1, v2" in capsys.readouterr().err
    assert compare.main(["sft", "v1"]) == 1
    assert "sft was never evaluated; run stage `evaluate@sft`" in capsys.readouterr().err
    Path("dvc.lock").unlink()
    assert compare.main(["v1", "v2"]) == 1
    assert "dvc.lock is missing: nothing has run here" in capsys.readouterr().err
