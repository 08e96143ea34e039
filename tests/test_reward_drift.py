from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from ranks import SMALL, TRAINED, join_alone, train_tokenizer
from stages import stage_here

from model.network.transformer import ModelConfig, first_weights
from model.network.weights import fill_weights
from model.scoring.reward import RewardModel, draw_heads, open_reward, save_reward, score
from model.text.dialogue import encode_dialogue
from model.text.tokenizer import Tokenizer
from model.training.engine import EngineParams, build_model
from tasks.reward_drift import MODELS, Params, run
from tasks.running.stage import Stage

WORDS = ["the", "llama", "walks", "over", "a", "hill", "and", "yes", "or", "no"]


def write_reward_model(directory: Path, tokenizer: Path, seed: int) -> None:
    values = {**SMALL, "vocab_size": 290, "max_position_embeddings": 48, "initializer_range": 0.3}
    config = ModelConfig.model_validate(values)
    model = build_model(partial(RewardModel, tells_safety=False), config, EngineParams.model_validate(TRAINED))
    generator = torch.Generator().manual_seed(seed)
    fill_weights(model.model, lambda name, shape: first_weights(name, shape, config, generator))
    draw_heads(model, seed)
    save_reward(model, Tokenizer(tokenizer), directory, {"step": 1}, 10**9)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    join_alone()
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(root, [" ".join(WORDS), "[INST] the llama [/INST] walks"])
    for seed, name in enumerate(MODELS):
        write_reward_model(root / "data" / name / "v1", tokenizer, seed)
    return root / "data"


def pair(number: int, **changes: Any) -> dict[str, Any]:
    words = [WORDS[(number * step) % len(WORDS)] for step in range(1, 6)]
    return {
        "id": f"p{number}", "messages": [{"role": "user", "content": f"{words[0]} {words[1]}?"}],
        "chosen": f"{words[2]} {words[3]}", "rejected": words[4] + " no", "degree": "better",
        "kind": "safety" if number % 2 else "helpfulness", "chosen_safe": True, "rejected_safe": None,
        "category": "factual", "responders": None, "annotator": "one", "source": "world", "round": "v2", **changes,
    }  # fmt: skip


PAIRS = [
    *(pair(number) for number in range(8)),
    pair(8, round="v1"),
    pair(9, round=None, degree=None, source="hh"),
    pair(10, chosen="walks over " * 40),
]


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, "data")
    write_pairs(PAIRS)
    return tmp_path


def write_pairs(pairs: list[dict[str, Any]]) -> None:
    directory = Path("data/preferences/v2")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "validation.jsonl").write_text("".join(json.dumps(each) + "\n" for each in pairs))


def stage_of(name: str = "reward_drift@v1_on_v2", **changes: Any) -> Stage[Params]:
    values = {"comparisons": {"v1_on_v2": {"model": "v1", "batch": "v2"}}, "precision": "fp32", "tokens_at_once": 64}
    return stage_here(name, Params.model_validate({**values, **changes}))


def test_both_models_score_the_pairs_that_the_later_round_collected(place: Path) -> None:
    stage = stage_of()
    figures = run(stage)
    rows = [json.loads(line) for line in (stage.output / "scores.jsonl").read_text().splitlines()]
    assert [(row["model"], row["id"]) for row in rows] == [(name, f"p{n}") for name in MODELS for n in range(8)]
    assert figures["pairs"] == 9
    assert figures["reward_safety/pairs_too_long"] == 1
    for row in rows:
        model, tokenizer = open_reward(Path("data") / row["model"] / "v1", "fp32", torch.device("cpu"))
        told = next(each for each in PAIRS if each["id"] == row["id"])
        for side in ("chosen", "rejected"):
            ids = encode_dialogue([*told["messages"], {"role": "assistant", "content": told[side]}], tokenizer).ids
            assert row[f"{side}_score"] == pytest.approx(score(model, [ids], 10**6)[0], abs=1e-5)
            answer = tokenizer.encode(f" {told[side]} ", bos=False, eos=True)
            assert abs(row[f"num_tokens_{side}"] - len(answer)) <= 1  # where text begins, a space of its own stands
    for name in MODELS:
        own = [row for row in rows if row["model"] == name]
        safety = [row for row in own if row["kind"] == "safety"]
        rights = [row["chosen_score"] > row["rejected_score"] for row in safety]
        assert figures[f"{name}/safety/accuracy"] == sum(rights) / 4
        assert figures[f"{name}/safety/better/accuracy/low"] < figures[f"{name}/safety/better/accuracy/high"]
    table = pandas.read_csv(stage.output / "plots" / "accuracy.csv").set_index("part")
    assert table.loc["reward_safety/all", "accuracy"] == figures["reward_safety/accuracy"]
    assert {path.name for path in stage.artifacts.glob("*.png")} == {
        f"{name}_accuracy_by_degree.png" for name in MODELS
    }


def test_the_number_of_tokens_at_once_changes_no_figure(place: Path) -> None:
    assert run(stage_of(tokens_at_once=1)) == run(stage_of(tokens_at_once=10**6))


def test_an_unknown_comparison_is_explained(place: Path) -> None:
    with pytest.raises(ValueError, match=r"`reward_drift.comparisons` has no `v1`: it has reward_drift@v1_on_v2"):
        run(stage_of("reward_drift@v1"))


def test_a_batch_that_is_not_later_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"`reward_drift.comparisons.v1_on_v2`: batch v1 is not later than model v1"):
        run(stage_of(comparisons={"v1_on_v2": {"model": "v1", "batch": "v1"}}))


def test_a_batch_without_pairs_of_its_own_is_explained(place: Path) -> None:
    write_pairs([PAIRS[8], PAIRS[9]])
    with pytest.raises(ValueError, match=r"validation.jsonl holds no pair of round v2: nothing to compare on"):
        run(stage_of())


def test_pairs_that_are_all_too_long_are_explained(place: Path) -> None:
    write_pairs([PAIRS[10]])
    with pytest.raises(ValueError, match=r"all 1 pairs are longer than the 48 tokens of data/reward_helpfulness/v1"):
        run(stage_of())
