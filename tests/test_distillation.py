from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from ranks import join_alone
from ruamel.yaml import YAML
from stages import stage_here
from test_rejection_sampling import HELPFULNESS_SCORES, SAFETY_SCORES, write_reward
from test_rejection_sampling import values_of as sampling_values
from test_versions import base, write_all, write_params  # noqa: F401 - a fixture

from model.network.checkpoint import open_checkpoint, read_config
from tasks import distillation
from tasks.distillation import Params, run
from tasks.learning.loop import digest_of
from tasks.reading.prompts import KINDS
from tasks.running.files import read_lines, write_lines
from tasks.running.stage import Stage

NAMES = ("base", "demonstrations", "distilled", "own")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> Path:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path, base)
    write_params(tmp_path, epochs=1)
    with Path("params.yaml").open("a") as file:
        YAML().dump({"rejection_sampling": sampling_values(save_every=20)}, file)
    join_alone()
    for seed, kind in enumerate(KINDS):
        directory = Path(f"data/reward_{kind}/v1")
        write_reward(directory, base / "tokenizer.model", seed, read_config(base).vocab_size)
        write_lines(directory / "scores.jsonl", HELPFULNESS_SCORES if kind == "helpfulness" else SAFETY_SCORES)
    return tmp_path


def stage_of(fresh: bool = True, **changes: Any) -> Stage[Params]:
    values = {
        "init_from": "base", "distil_from": "data/rejection_sampling/v1", "rewards": "v1", "temperature": 0.5,
        "num_layers": [1], "base_epochs": 6,
    }  # fmt: skip
    return stage_here("distillation", Params.model_validate({**values, **changes}), fresh)


@pytest.mark.slow
def test_each_size_learns_samples_and_as_many_steps_of_demonstrations_alone(place: Path) -> None:
    figures = run(stage_of(num_layers=[1, 2]))
    for size in (1, 2):
        models = {name: Path(f"out/{size}_layers/{name}") for name in NAMES}
        training = {name: json.loads((model / "training.json").read_text()) for name, model in models.items()}
        assert training["distilled"]["step"] == training["demonstrations"]["step"] == training["own"]["step"]
        assert figures[f"{size}_layers/distilled/steps"] == training["distilled"]["step"]
        start = digest_of(models["base"])
        assert all(training[name]["base_sha256"] == start for name in NAMES if name != "base")
        assert len({digest_of(model) for model in models.values()}) == len(NAMES)
        for path in models.values():
            model, _ = open_checkpoint(path, "fp32", torch.device("cpu"))
            assert len(model.model.layers) == size
            parameters = sum(weight.numel() for weight in model.parameters())
            assert parameters == figures[f"{size}_layers/{path.name}/parameters"]
    curves = pandas.read_csv("out/plots/loss.csv")
    prompts = {line["id"]: line["messages"][:-1] for line in read_lines(Path("data/rejection_sampling/v1/best.jsonl"))}
    for size in (1, 2):
        own = read_lines(Path(f"out/{size}_layers/own.jsonl"))
        assert own and all(line["messages"][:-1] == prompts[line["id"]] for line in own)
        drawn = [
            candidate["text"]
            for path in Path(f"scratch/{size}_layers/own/samples").iterdir()
            for candidates in json.loads(path.read_text())
            for candidate in candidates
        ]
        assert {line["messages"][-1]["content"] for line in own} <= set(drawn)
    assert sorted(set(curves["model"])) == [f"{size} layers, {name}" for size in (1, 2) for name in NAMES]
    last = curves[curves["model"] == "1 layers, distilled"].iloc[-1]
    assert last["loss"] == figures["1_layers/distilled/validation_loss"]


def test_a_model_with_all_its_layers_is_the_model(place: Path) -> None:
    stage = stage_of()
    distillation.keep_first_layers(stage, 2, Path("whole"))
    distillation.keep_first_layers(stage, 1, Path("part"))
    assert digest_of(Path("whole")) == digest_of(Path("base"))
    whole, part = (
        dict(open_checkpoint(Path(name), "fp32", torch.device("cpu"))[0].named_parameters())
        for name in ("whole", "part")
    )
    assert {name for name in whole if name not in part} == {name for name in whole if ".layers.1." in name}
    assert all(torch.equal(weight, whole[name]) for name, weight in part.items())


@pytest.mark.slow
def test_a_stopped_study_goes_on_with_the_training_that_it_was_at(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(stage_of())
    files = {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    real, names = distillation.train, []

    def stops_at_the_third(stage: Stage[Any], *arguments: Any, **more: Any) -> dict[str, float]:
        names.append(stage.entry)
        if len(names) == 3:  # what the small model drew stays
            raise KeyboardInterrupt
        return real(stage, *arguments, **more)

    monkeypatch.setattr(distillation, "train", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(stage_of())
    assert run(stage_of(fresh=False)) == whole
    assert names == [f"1_layers/{name}" for name in ("base", "distilled", "own", "own", "demonstrations")]
    assert {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()} == files


def test_a_model_that_ends_no_answer_is_refused(place: Path) -> None:
    text = Path("params.yaml").read_text()
    assert "max_new_tokens: 8" in text
    Path("params.yaml").write_text(text.replace("max_new_tokens: 8", "max_new_tokens: 1"))
    with pytest.raises(ValueError, match="the model of 1_layers has no answer that can be chosen to any of 40 prompts"):
        run(stage_of(base_epochs=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": [3]}, r"`distillation.num_layers` has 3, but base has 2 layers: keep between 1 and that many"),
        ({"num_layers": [0]}, r"`distillation.num_layers` has 0, but base has 2 layers"),
        ({"num_layers": [1, 1]}, r"`distillation.num_layers` has a size twice: \[1, 1\]"),
        ({"rewards": "v2"}, r"data/reward_helpfulness/v2/scores.jsonl is missing: run stage `reward_helpfulness@v2`"),
        ({"distil_from": "data/none"}, r"data/none/best.jsonl holds no samples: run the stage rejection_sampling"),
    ],
)
def test_a_study_of_what_does_not_exist_is_refused(place: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(stage_of(**changes))
    assert not list(Path("scratch").iterdir())
