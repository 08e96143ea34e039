from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pandas
import pytest
import test_reward
import torch
from ranks import join_alone
from stages import stage_here
from test_reward import TRAIN, chat, params_of, write_inputs, write_params, write_preferences  # noqa: F401 - a fixture

from tasks.learning import reward
from tasks.reward_scaling import Params, accuracy_of, interval, read_study, run, train
from tasks.running.stage import Stage

TRAINED = params_of(epochs=2, other_share=0.25, warmup_steps=2)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chat: Path) -> Path:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path, chat)
    write_params(tmp_path, reward_helpfulness=TRAINED)
    join_alone()
    return tmp_path


def stage_of(fresh: bool = True, **changes: Any) -> Stage[Params]:
    values = {
        "kind": "helpfulness", "init_from": "chat", "preferences": "data/preferences/v1", "num_layers": [1, 2],
        "shares": [0.5, 1.0], "num_seeds": 2,
    }  # fmt: skip
    return stage_here("reward_scaling", Params.model_validate({**values, **changes}), fresh)


def test_students_interval_by_hand() -> None:
    # deviation 0.1, of the mean 0.1 / sqrt(3); Student's 97.5% point of two degrees of freedom is 4.30265
    assert interval([0.5, 0.6, 0.4]) == pytest.approx(
        (0.5, 0.5 - 0.430265 / math.sqrt(3), 0.5 + 0.430265 / math.sqrt(3))
    )
    assert interval([0.8, 1.0])[1:] == (0.0, 1.0)
    assert interval([0.7, 0.7]) == pytest.approx((0.7, 0.7, 0.7))


def test_a_tie_counts_half() -> None:
    assert accuracy_of([(2.0, 1.0), (1.0, 1.0), (0.0, 1.0), (3.0, 0.0)]) == 2.5 / 4


def test_each_size_learns_from_each_amount_with_each_seed(place: Path) -> None:
    stage = stage_of()
    figures = run(stage)
    runs = pandas.read_csv("out/runs.csv")
    # 24 pairs of its own kind, a third as many others
    assert sorted(zip(runs["layers"], runs["pairs"], runs["seed"], strict=True)) == [
        (layers, pairs, seed) for layers in (1, 2) for pairs in (16, 32) for seed in (1, 2)
    ]
    own = runs[(runs["layers"] == 2) & (runs["pairs"] == 32)]["accuracy"]
    assert figures["layers_2/pairs_32/accuracy"] == own.mean()
    table = pandas.read_csv("out/plots/scaling.csv")
    assert table["model"].tolist() == ["1 layer", "1 layer", "2 layers", "2 layers"]
    base = read_study(stage)
    for row in table.itertuples():
        model = reward.RewardModel(base.config, "off")
        del model.model.layers[int(row.model.split()[0]) :]
        assert row.parameters == sum(weight.numel() for weight in model.parameters())
        assert 0 <= row.low <= row.accuracy <= row.high <= 1
    assert (stage.artifacts / "scaling.png").exists()


def test_the_whole_model_on_all_pairs_is_what_the_stage_trains(place: Path) -> None:
    base = read_study(stage_of())
    trained = reward.run(test_reward.stage_of(**TRAINED))
    assert trained["pairs_trained"] == len(base.data.train) == 32
    lines = [json.loads(line) for line in Path("out/scores.jsonl").read_text().splitlines()]
    own = [(line["chosen_score"], line["rejected_score"]) for line in lines if line["kind"] == "helpfulness"]
    assert torch.tensor(train(base, 2, 32, seed=1)).numpy() == pytest.approx(torch.tensor(own).numpy(), abs=1e-5)
    assert not torch.allclose(torch.tensor(train(base, 2, 32, seed=2)), torch.tensor(own), atol=1e-3)


def test_a_stopped_study_goes_on_with_the_training_that_it_was_at(place: Path) -> None:
    whole = run(stage_of())
    done = json.loads(Path("scratch/done.json").read_text())
    stopped = stage_of()
    (stopped.scratch / "done.json").write_text(json.dumps(done[:5]))
    assert run(stage_of(fresh=False)) == whole
    known = [{**each, "accuracy": 0.125} for each in done[:7]]  # what is done is not done again
    (stopped.scratch / "done.json").write_text(json.dumps(known))
    run(stage_of(fresh=False))
    assert pandas.read_csv("out/runs.csv")["accuracy"].tolist()[:7] == [0.125] * 7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_layers": [3]},
            r"`reward_scaling.num_layers` has 3, but chat has 2 layers: keep between 1 and that many",
        ),
        ({"num_layers": [0]}, r"`reward_scaling.num_layers` has 0, but chat has 2 layers"),
        ({"shares": [1.5]}, r"`reward_scaling.shares` has 1.5, which is not a share of 32 pairs: set it above 0"),
        ({"num_layers": [1, 1]}, r"`reward_scaling.num_layers` has one model twice \(1, 1\): its repetition would"),
        ({"shares": [0.5, 0.501]}, r"`reward_scaling.shares` has one model twice \(16, 16\)"),
        ({"shares": [0.001]}, r"`reward_scaling.shares` has 0.001, which is not a share of 32 pairs"),
    ],
)
def test_a_study_that_cannot_be_made_is_explained(changes: dict[str, Any], message: str, place: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(stage_of(**changes))


def test_nothing_to_measure_on_is_explained(place: Path) -> None:
    others = [pair for pair in TRAIN if pair["kind"] == "safety"]
    write_preferences(Path("data/preferences/v1"), TRAIN, others)
    with pytest.raises(ValueError, match=r"data/preferences/v1/validation.jsonl holds no helpfulness pair"):
        run(stage_of())
