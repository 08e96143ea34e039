from __future__ import annotations

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pandas
import pytest
from ranks import join_alone
from stages import Workspace, stage_here
from test_evaluate import asked, checkpoint, write_prompts

from tasks.self_bleu import Params, run, self_bleu

__all__ = ["checkpoint"]


def values_of(checkpoint: str, **changes: Any) -> dict[str, Any]:
    values = {
        "checkpoints": {"sft": checkpoint}, "root": "prompts", "prompts": ["asked.jsonl"],
        "kinds": {"factual": ["factual"], "creative": ["writing", "dialogue"]}, "num_prompts": 3, "num_samples": 4,
        "temperatures": [0.0, 1.5], "top_p": 1, "top_k": 0, "max_new_tokens": 8, "precision": "fp32", "max_rows": 16,
    }  # fmt: skip
    return {**values, **changes}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    join_alone()
    rows = [asked(number, ("factual", "writing", "dialogue")[number % 3]) for number in range(12)]
    write_prompts(Path("prompts/asked.jsonl"), rows)
    return tmp_path


def bleu(hypothesis: list[str], references: list[list[str]]) -> float:
    """BLEU as Papineni et al. 2002 define it, for texts whose four precisions are not zero."""
    logs = 0.0
    for size in range(1, 5):

        def grams(words: list[str], size: int = size) -> Counter[tuple[str, ...]]:
            return Counter(tuple(words[first : first + size]) for first in range(len(words) - size + 1))

        own, most = grams(hypothesis), Counter[tuple[str, ...]]()
        for reference in references:
            most |= grams(reference)
        logs += math.log(sum((own & most).values()) / sum(own.values())) / 4
    nearest = min((abs(len(each) - len(hypothesis)), len(each)) for each in references)[1]
    return 100 * math.exp(logs + min(0.0, 1 - nearest / len(hypothesis)))


def test_it_is_the_mean_bleu_of_each_text_against_all_others() -> None:
    texts = [
        "the llama walks over the hill and rests",
        "the llama walks over the hill today",
        "a llama walks over the hill and rests there",
    ]
    words = [text.split() for text in texts]
    expected = [bleu(own, [each for each in words if each != own]) for own in words]
    assert min(expected) > 1
    assert self_bleu(texts) == pytest.approx(sum(expected) / 3, abs=1e-6)


def test_equal_texts_have_100_and_texts_without_a_common_word_nearly_none() -> None:
    assert self_bleu(["walks"] * 5) == pytest.approx(100)
    assert self_bleu(["a hill", "a hill", "a hill", "two llamas walk today"]) == pytest.approx(75, abs=10)
    assert self_bleu(["one two three four five", "six seven eight nine ten"]) < 10
    # asking sacrebleu for a text that occurs twice would give the same
    from sacrebleu.metrics.bleu import BLEU

    assert BLEU(effective_order=True).sentence_score("a hill", ["a hill", "x"]).score == pytest.approx(100)


def test_answers_are_alike_at_temperature_0_and_differ_above(place: Path, checkpoint: Path) -> None:
    figures = run(stage_here("self_bleu@sft", Params.model_validate(values_of(str(checkpoint)))))
    table = pandas.read_csv("out/self_bleu.csv")
    assert list(zip(table["kind"], table["temperature"], strict=True)) == [
        ("factual", 0.0), ("creative", 0.0), ("factual", 1.5), ("creative", 1.5),
    ]  # fmt: skip
    assert list(table["prompts"]) == [3] * 4
    assert list(table["samples"]) == [4] * 4
    assert list(table["self_bleu"])[:2] == pytest.approx([100, 100])
    assert all(table["self_bleu"][2:] < 90)
    assert all(table["low"][2:] < table["self_bleu"][2:])
    assert figures["creative/temperature_1.5/self_bleu"] == pytest.approx(table["self_bleu"][3])
    assert figures["prompts"] == 6
    plot = json.loads(Path("out/plots/self_bleu.json").read_text())
    assert (plot["x"], plot["y"], plot["series"]) == ("temperature", "self_bleu", "kind")


def test_what_cannot_be_asked_is_named(place: Path, checkpoint: Path) -> None:
    def run_with(name: str = "self_bleu@sft", **changes: Any) -> None:
        run(stage_here(name, Params.model_validate(values_of(str(checkpoint), **changes))))

    with pytest.raises(ValueError, match=r"`self_bleu.checkpoints` has no `v9`: ask one of self_bleu@sft"):
        run_with("self_bleu@v9")
    with pytest.raises(
        ValueError, match=r"holds 4 single questions of the categories factual, and .* asks for 5: lower"
    ):
        run_with(num_prompts=5)
    write_prompts(Path("prompts/asked.jsonl"), [{"id": f"p{n}", "prompt": "walks " * 99} for n in range(3)])
    with pytest.raises(ValueError, match=r"prompt p\d has \d+ tokens, and the context of .* is 96: leave it out"):
        run_with(kinds={"factual": ["asked"]})


DVC_STAGE = f"""\
stages:
  self_bleu:
    foreach: ${{self_bleu.checkpoints}}
    do:
      cmd: exec {sys.executable} -m tasks.workers.launch self_bleu ${{key}}
      deps:
      - ${{item}}
      params:
      - self_bleu.num_samples
      outs:
      - data/self_bleu/${{key}}
"""


@pytest.mark.slow
def test_ranks_share_the_prompts(place: Path, tmp_path: Path, checkpoint: Path) -> None:
    values = values_of(str(checkpoint))
    figures = run(stage_here("self_bleu@sft", Params.model_validate(values)))
    root = tmp_path / "workspace"
    write_prompts(
        root / "prompts" / "asked.jsonl",
        [json.loads(line) for line in Path("prompts/asked.jsonl").read_text().splitlines()],
    )
    workspace = Workspace(root, "self_bleu sft", DVC_STAGE, 2, self_bleu=values)
    assert workspace.finish() == pytest.approx(figures)
