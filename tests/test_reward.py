from __future__ import annotations

import json
import math
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from ranks import SMALL, TRAINED, join_alone, train_tokenizer
from ruamel.yaml import YAML
from safetensors.torch import load_file
from stages import Workspace, stage_here

from model.network.checkpoint import save_model
from model.network.transformer import Llama, ModelConfig
from model.scoring.reward import open_reward, score
from model.text.dialogue import encode_dialogue
from model.text.tokenizer import Tokenizer
from model.training.engine import EngineParams, Step, build_model, draw_weights
from tasks.learning import reward
from tasks.learning.loop import Progress, read_base
from tasks.learning.reward import Params, plan_steps, run, share_out
from tasks.reading.preferences import Preference
from tasks.running.params import parse_section
from tasks.running.stage import Stage

SIDES = ("chosen", "rejected")
DEGREES = ("significantly", "better", "slightly", "negligibly")
WATCHED: dict[str, Any] = {
    "margins": "small", "safety_loss_weight": 0.0, "own_public": False, "other_share": 0.5, "context": 64, "epochs": 4,
    "num_bins": 5, "log_every": 5, "save_every": 4, "max_shard_bytes": 10**9,
}  # fmt: skip
ROUND = {
    "newest": "chat",
    "earlier": "early",
    "batches": "public",
    "samples": "none",
    "distil_from": "none",
    "ghost_attention": "data/seeds/none",
    "context_distillation": "data/seeds/none",
}
ROUNDS = {"v1": ROUND}


def params_of(**changes: Any) -> dict[str, Any]:
    return {**TRAINED, "batch_rows": 8, "micro_batch_rows": 4, "learning_rate": 3e-3, **WATCHED, **changes}


def preference(number: int, kind: str = "helpfulness", **changes: Any) -> dict[str, Any]:
    """The better answer is `blue` to a question for help, and `no` to one that does harm."""
    good, bad = ("blue", "red red") if kind == "helpfulness" else ("no", "red blue")
    safe, unsafe = (None, None) if kind == "helpfulness" else (True, False)
    return {
        "id": f"{kind}{number}", "kind": kind, "messages": [{"role": "user", "content": f"{number}: {kind[0]} sky?"}],
        "chosen": good, "rejected": bad, "degree": DEGREES[number % 4], "chosen_safe": safe, "rejected_safe": unsafe,
        "category": "colours", "responders": None, "annotator": "a", "source": "world", "round": "v1", **changes,
    }  # fmt: skip


def public(number: int, kind: str) -> dict[str, Any]:
    unknown = {"degree": None, "chosen_safe": None, "rejected_safe": None, "round": None, "source": "hh"}
    return preference(number, kind, id=f"public{kind}{number}", **unknown)


def write_preferences(directory: Path, train: list[dict[str, Any]], validation: list[dict[str, Any]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("validation", validation)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


KINDS = ("helpfulness", "safety")
TRAIN = [preference(n, kind) for n in range(24) for kind in KINDS]
TRAIN += [public(n, kind) for n in range(8) for kind in KINDS]
VALIDATION = [preference(n, kind) for n in range(100, 108) for kind in KINDS]


@pytest.fixture(scope="session")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model that has learnt nothing, with a tokenizer."""
    directory = tmp_path_factory.mktemp("chat")
    join_alone()
    texts = ["the sky is blue, and so on 12", "[INST] and no rose? [/INST] red"]
    tokenizer = Tokenizer(train_tokenizer(directory, texts, 300))
    config = ModelConfig.model_validate({**SMALL, "max_position_embeddings": 64, "vocab_size": 300})
    model = build_model(Llama, config, EngineParams.model_validate(TRAINED))
    draw_weights(model, seed=1)
    save_model(model, tokenizer, directory / "chat", {}, 10**9)
    return directory / "chat"


def write_inputs(root: Path, chat: Path) -> None:
    shutil.copytree(chat, root / "chat")
    write_preferences(root / "data/preferences/v1", TRAIN, VALIDATION)


def write_params(root: Path, **sections: Any) -> None:
    with (root / "params.yaml").open("w") as file:
        YAML().dump({"seed": 1, "rounds": ROUNDS, **sections}, file)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: Path) -> Path:
    """A working directory with a chat model and preferences."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path, chat)
    write_params(tmp_path)
    join_alone()
    return tmp_path


def stage_of(kind: str = "helpfulness", fresh: bool = True, **changes: Any) -> Stage[Params]:
    return stage_here(f"reward_{kind}@v1", Params.model_validate(params_of(**changes)), fresh)


def lines_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def metrics_of(name: str) -> list[tuple[int, float]]:
    lines = lines_of("record/metrics.jsonl")
    return [(line["step"], line["metrics"][name]) for line in lines if name in line["metrics"]]


def open_parts(directory: str) -> dict[str, torch.Tensor]:
    return {name: weight for path in Path(directory).glob("*.safetensors") for name, weight in load_file(path).items()}


# --- whole runs in this process ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_comes_out_that_tells_better_answers(kind: str, place: Path) -> None:
    weight = 0.5 if kind == "safety" else 0.0
    figures = run(stage_of(kind, epochs=12, log_every=1, safety_loss_weight=weight))
    assert figures["accuracy"] == 1
    assert figures[f"{kind}/accuracy"] == 1
    assert figures["pairs_trained"] == 48  # 24 of its own, as many others
    assert figures["pairs_own"] == 24
    assert figures["steps"] == 48 * 12 / 4
    assert figures["parameters"] == sum(weight.numel() for weight in open_parts("out").values())
    losses = metrics_of("train/loss")
    assert [step for step, _ in losses] == list(range(1, int(figures["steps"]) + 1))
    assert losses[-1][1] < losses[0][1] / 2
    assert [value for _, value in metrics_of("train/accuracy")][-5:] == [1] * 5
    assert all(value > 0 for name in ("pairs", "tokens") for _, value in metrics_of(f"train/{name}_per_second"))
    curve = pandas.read_csv("out/plots/train.csv")
    assert list(curve) == ["step", "pairs", "tokens", "loss", "accuracy", "gradient_norm", "learning_rate"]
    assert curve["pairs"].tolist() == list(range(4, 48 * 12 + 1, 4))
    assert Path("out/plots/accuracy.csv").exists()
    training = json.loads(Path("out/training.json").read_text())
    assert (training["step"], training["tokens"]) == (figures["steps"], figures["tokens"])
    assert Path("out/safety_head.safetensors").exists() == (kind == "safety")

    rows = lines_of("out/scores.jsonl")
    model, tokenizer = open_reward(Path("out"), "fp32", torch.device("cpu"))
    assert [row["id"] for row in rows] == [row["id"] for row in VALIDATION]
    for row, given in zip(rows, VALIDATION, strict=True):
        assert row.items() >= {k: v for k, v in given.items() if k not in ("messages", "chosen", "rejected")}.items()
        for side in SIDES:
            answer = {"role": "assistant", "content": given[side]}
            ids, is_learnt = encode_dialogue([*given["messages"], answer], tokenizer)  # type: ignore[list-item]
            assert row[f"{side}_score"] == pytest.approx(score(model, [ids], 1)[0], abs=1e-5)
            assert row[f"num_tokens_{side}"] == sum(is_learnt)


def test_the_safety_head_learns_what_is_safe(place: Path) -> None:
    run(stage_of("safety", epochs=12, safety_loss_weight=1.0))
    model, tokenizer = open_reward(Path("out"), "fp32", torch.device("cpu"))
    head = load_file("out/safety_head.safetensors")["safety.weight"]
    model.score.weight.data = head  # in the other one's place
    for row in VALIDATION[1::2]:
        ids = [
            encode_dialogue([*row["messages"], {"role": "assistant", "content": row[side]}], tokenizer).ids
            for side in SIDES
        ]
        safe, unsafe = score(model, ids, 1000)
        assert safe > 0 > unsafe


def test_the_logged_loss_is_the_mean_over_the_pairs(place: Path) -> None:
    stage = stage_of(log_every=1, learning_rate=1e-12)  # so small that the model stays what it was
    figures = run(stage)
    model, tokenizer = open_reward(Path("out"), "fp32", torch.device("cpu"))
    data = reward.read_data(
        Path("data/preferences/v1"), "helpfulness", stage.params, tokenizer, 1, "reward_helpfulness"
    )
    margins = {"significantly": 1, "better": 2 / 3, "slightly": 1 / 3}
    losses = []
    for given, pair in data.train:
        chosen, rejected = score(model, [pair.chosen, pair.rejected], 1000)
        losses.append(math.log1p(math.exp(rejected - chosen + margins.get(given.degree or "", 0))))
    expected = [np.mean([losses[n] for n in numbers]) for numbers in plan_steps(len(losses), stage.params, 1)]
    assert [loss for _, loss in metrics_of("train/loss")] == pytest.approx(expected, abs=1e-4)
    assert figures["train/loss"] == pytest.approx(expected[-1], abs=1e-4)


def test_a_stopped_run_resumes_to_the_same_bytes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"safety_loss_weight": 0.5, "precision": "bf16", "zero_stage": 1}
    figures = run(stage_of("safety", **settings))
    undisturbed = {path.relative_to("out"): path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    assert {Path("safety_head.safetensors"), Path("scores.jsonl"), Path("plots/train.csv")} <= undisturbed.keys()
    real, calls = reward.train_step, []

    def stopped_at_11(*arguments: Any) -> Step:
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(reward, "train_step", stopped_at_11)
    with pytest.raises(KeyboardInterrupt):
        run(stage_of("safety", **settings))
    assert run(stage_of("safety", fresh=False, **settings)) == figures
    assert len(calls) == 10 + 1 + figures["steps"] - 8
    assert {p.relative_to("out"): p.read_bytes() for p in Path("out").rglob("*") if p.is_file()} == undisturbed


def test_a_last_step_of_few_pairs_learns_from_each_once(place: Path) -> None:
    stage = stage_of(batch_rows=8, micro_batch_rows=4)
    _, tokenizer = read_base(Path("chat"), 64, "reward_helpfulness")
    data = reward.read_data(Path("data/preferences/v1"), "helpfulness", stage.params, tokenizer, 1, "reward")
    engine = type("Engine", (), {"device": torch.device("cpu")})()
    training = reward.Training(stage, engine, data, [], Progress({}))
    first, second = reward.micro_batches(training, [0, 1, 2])
    assert [len(batch.documents.lengths) for batch in (first, second)] == [4, 2]
    assert (first.weight, second.weight) == (1, 1)
    first, second = reward.micro_batches(training, [0, 1])
    assert (first.weight, second.weight) == (1, 0)


# --- what it learns from ---


def preferences_of(**counts: int) -> list[Preference]:
    rows = [
        (public if name.startswith("public") else preference)(n, name.removeprefix("public_"))
        for name, count in counts.items()
        for n in range(count)
    ]
    return [Preference.model_validate(row) for row in rows]


def test_helpfulness_takes_its_own_pairs_and_as_many_drawn_from_all_others() -> None:
    found = preferences_of(helpfulness=40, safety=60, public_helpfulness=60, public_safety=60)
    params = Params.model_validate(params_of(other_share=0.5))
    own, others = share_out(found, "helpfulness", params, seed=1)
    assert own == found[:40]
    assert len(others) == 40 == len({each.id for each in others})
    drawn = [(each.kind, each.round) for each in others]
    counts = [drawn.count(of) for of in (("safety", "v1"), ("helpfulness", None), ("safety", None))]
    assert sum(counts) == 40
    assert all(5 <= count <= 22 for count in counts)  # each a third of what is drawn from
    assert share_out(found, "helpfulness", params, seed=1) == (own, others)
    assert share_out(found, "helpfulness", params, seed=2)[1] != others


def test_safety_takes_public_pairs_as_its_own_and_one_in_ten_of_helpfulness() -> None:
    found = preferences_of(helpfulness=40, safety=60, public_helpfulness=60, public_safety=30)
    own, others = share_out(found, "safety", Params.model_validate(params_of(other_share=0.1, own_public=True)), seed=1)
    assert own == [each for each in found if each.kind == "safety"]
    assert len(others) == 10
    assert {each.kind for each in others} == {"helpfulness"}


def test_a_share_that_the_others_do_not_fill_takes_them_all() -> None:
    found = preferences_of(helpfulness=40, safety=7)
    assert len(share_out(found, "helpfulness", Params.model_validate(params_of()), seed=1)[1]) == 7
    own, others = share_out(found, "helpfulness", Params.model_validate(params_of(other_share=0)), seed=1)
    assert (len(own), others) == (40, [])


def test_each_pair_is_used_once_an_epoch_in_an_order_of_its_own() -> None:
    params = Params.model_validate(params_of(epochs=2, batch_rows=8))
    steps = plan_steps(10, params, seed=1)
    assert [len(step) for step in steps] == [4, 4, 4, 4, 4]
    order = [number for step in steps for number in step]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert plan_steps(10, params, seed=1) == steps != plan_steps(10, params, seed=2)


def test_pairs_longer_than_the_context_are_counted_and_listed(place: Path) -> None:
    long = {"chosen": "blue " * 60}
    train = [*TRAIN, preference(200, **long), preference(201, rejected="red " * 60)]
    write_preferences(Path("data/preferences/v1"), train, [*VALIDATION, preference(202, **long)])
    figures = run(stage_of(epochs=1))
    assert figures["pairs_too_long"] == 3
    assert figures["pairs_trained"] == 24 + 26  # as many others as its own, the long ones included
    assert figures["pairs_own"] == 24
    found = lines_of("out/too_long.jsonl")
    assert [row["id"] for row in found] == ["helpfulness200", "helpfulness201", "helpfulness202"]
    assert all(row["num_tokens"] > 64 and row["source"] == "world" for row in found)
    assert len(lines_of("out/scores.jsonl")) == len(VALIDATION)


# --- what stops it ---


def test_training_that_failed_stops_with_step_and_pairs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = reward.pair_losses, []

    def fails_at_third(engine: Any, batch: Any, weight: float) -> Any:
        calls.append(1)
        losses, leads = real(engine, batch, weight)
        return (losses * math.nan, leads) if len(calls) == 5 else (losses, leads)  # two micro batches a step

    monkeypatch.setattr(reward, "pair_losses", fails_at_third)
    with pytest.raises(ValueError, match=r"step 3: loss nan.*Lower `reward_helpfulness\.learning_rate`, or") as caught:
        run(stage_of())
    assert str(caught.value).split("learnt from: ")[1].count(", ") == 3


@pytest.mark.parametrize(
    ("labels", "said"),
    [((True, True), "all 48 say safe"), ((False, False), "all 48 say unsafe"), ((None, None), "there are none")],
)
def test_labels_of_safety_that_all_say_the_same_are_refused(place: Path, labels: Any, said: str) -> None:
    train = [preference(n, "safety", chosen_safe=labels[0], rejected_safe=labels[1]) for n in range(24)]
    write_preferences(Path("data/preferences/v1"), train, VALIDATION)
    with pytest.raises(ValueError, match=f"`reward_safety.safety_loss_weight` asks to learn .* {said}: look at the"):
        run(stage_of("safety", safety_loss_weight=0.5))
    run(stage_of("safety", safety_loss_weight=0.0, epochs=1))


def test_nothing_to_train_or_validate_on_is_refused(place: Path) -> None:
    with pytest.raises(
        ValueError, match=r"left to train on: .*v1 has 24, and none fits into `reward_safety.context` 5 "
    ):
        run(stage_of("safety", context=5))
    write_preferences(Path("data/preferences/v1"), [public(n, "helpfulness") for n in range(30)], VALIDATION)
    with pytest.raises(ValueError, match=r"left to train on: .* has 0, .*set `reward_helpfulness.own_public`"):
        run(stage_of())
    write_preferences(Path("data/preferences/v1"), TRAIN, [])
    with pytest.raises(ValueError, match=r"no pair is left to validate on: .* has 0"):
        run(stage_of())


def test_a_file_that_is_missing_or_no_preferences_is_named(place: Path) -> None:
    path = Path("data/preferences/v1/train.jsonl")
    path.write_text(json.dumps(preference(1)) + "\n" + json.dumps({**preference(2), "degree": "hardly"}) + "\n")
    with pytest.raises(ValueError, match=r"train.jsonl, line 2 is not a preference: `degree`: Input should be 's"):
        run(stage_of())
    path.write_text("{\n")
    with pytest.raises(ValueError, match=r"train.jsonl, line 1 is not a preference: Invalid JSON"):
        run(stage_of())
    path.unlink()
    with pytest.raises(ValueError, match=r"v1/train.jsonl is missing: run the stage `preferences` first"):
        run(stage_of())


def test_a_pair_that_is_no_dialogue_is_named(place: Path) -> None:
    write_preferences(Path("data/preferences/v1"), [*TRAIN, preference(99, chosen=" ")], VALIDATION)
    with pytest.raises(ValueError, match=r"pair helpfulness99 of world: turn 2 \(assistant\) is an empty answer"):
        run(stage_of())


def test_a_micro_batch_that_splits_a_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"micro_batch_rows 3 must be even: both answers of a pair are in one"):
        parse_section(Params, {"reward_safety": params_of(micro_batch_rows=3, batch_rows=9)}, "reward_safety")


def test_a_context_beyond_the_models_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"`reward_safety.context` is 65 tokens, and chat was trained with 64"):
        run(stage_of("safety", context=65))


# --- whole runs in processes of their own ---

DVC_STAGE = f"""\
stages:
  reward_safety:
    foreach: ${{rounds}}
    do:
      cmd: exec {sys.executable} -m tasks.workers.launch reward_safety ${{key}}
      deps:
      - ${{item.newest}}
      - data/preferences/${{key}}
      params:
      - seed
      - reward_safety
      outs:
      - data/reward_safety/${{key}}
"""


def workspace_of(root: Path, chat: Path, num_ranks: int = 1, **changes: Any) -> Workspace:
    settings = {"safety_loss_weight": 0.5, "own_public": True, "other_share": 0.1, "zero_stage": 1, **changes}
    write_inputs(root, chat)
    return Workspace(root, "reward_safety v1", DVC_STAGE, num_ranks, rounds=ROUNDS, reward_safety=params_of(**settings))


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, chat: Path) -> None:
    settings = {"precision": "bf16", "epochs": 20}
    undisturbed = workspace_of(tmp_path / "undisturbed", chat, **settings)
    undisturbed.finish()
    disturbed = workspace_of(tmp_path / "disturbed", chat, **settings)
    disturbed.kill_at(8, signal.SIGKILL)
    assert not (disturbed.output).exists()
    disturbed.finish()
    assert disturbed.files == undisturbed.files
    assert {"model.safetensors", "safety_head.safetensors", "metrics.json", "scores.jsonl"} <= undisturbed.files.keys()


@pytest.mark.slow
def test_two_ranks_reach_what_one_does(tmp_path: Path, chat: Path) -> None:
    one = workspace_of(tmp_path / "one", chat, micro_batch_rows=2)
    expected = one.finish()
    for zero_stage in (0, 3):
        two = workspace_of(tmp_path / f"two{zero_stage}", chat, num_ranks=2, micro_batch_rows=2, zero_stage=zero_stage)
        figures = two.finish()
        assert figures["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-3)
        assert figures["tokens"] == expected["tokens"]
        model, _ = open_reward(two.output, "fp32", torch.device("cpu"))
        assert model.score.weight.shape == (1, 32)
        for lines in zip(*(workspace.files["scores.jsonl"].splitlines() for workspace in (one, two)), strict=True):
            assert math.dist(*([json.loads(line)[f"{side}_score"] for side in SIDES] for line in lines)) < 0.01
