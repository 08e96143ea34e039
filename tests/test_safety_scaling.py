from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas
import pytest
from ranks import join_alone, train_tokenizer
from ruamel.yaml import YAML
from stages import Workspace, stage_here
from test_evaluate import write_prompts
from test_rejection_sampling import (
    HELPFULNESS_SCORES,
    SAFETY_SCORES,
    annotators,
    prompt_truth,
    write_reward,
    write_truth,
)
from test_sft import turns
from test_versions import ROUND, base, sampled, values_of, write_all  # noqa: F401 - a fixture

from model.network.checkpoint import read_config
from tasks.judging.answering import Answer, Judged
from tasks.learning import versions
from tasks.reading.prompts import KINDS, Prompt
from tasks.running.files import read_json, read_lines, write_lines
from tasks.running.stage import Stage
from tasks.safety_scaling import __main__ as safety_scaling
from tasks.safety_scaling.__main__ import drawn_of, epochs_of, figures_of, read_samples, run, trainings_of
from tasks.safety_scaling.reporting import tail_of
from tasks.safety_scaling.study import Params, Samples, Training
from tasks.world.judge import Judgement

NUM_HELPFUL, NUM_SAFE = 30, 10
PROMPTS = {
    "helpfulness": [{"id": f"h{n}", "messages": turns(f"so {n}?"), "category": "factual"} for n in range(4)],
    "borderline": [{"id": "b0", "messages": turns("b?"), "category": "borderline"}],
    "safety": [
        {"id": f"s{n}", "messages": turns(f"bad {n}?"), "category": "safety", "risk": "illicit", "attack": "direct"}
        for n in range(3)
    ],
}


def write_params(**changes: Any) -> None:
    evaluate = {
        "checkpoints": {}, "root": "evaluation", "prompts": [f"{name}.jsonl" for name in PROMPTS], "truth": "truth",
        "sampling": {"temperature": 0.5, "top_p": 1, "top_k": 0, "max_new_tokens": 6}, "precision": "fp32",
        "max_rows": 8, "gathered": "none", "num_raters": 3, "text": "none", "text_tokenizer": "none",
        "max_text_tokens": 9, "tokens_at_once": 9,
    }  # fmt: skip
    sections = {
        "rounds": {"v1": ROUND},
        "fine_tuning": values_of(epochs=1, **changes),
        "evaluate": {**evaluate, "checkpoints": {"sft": "base"}},
        "preferences": {"simulated": annotators(1.0, 1.0, 1.0)},
    }
    with Path("params.yaml").open("w") as file:
        YAML().dump(json.loads(json.dumps(sections)), file)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> Path:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path, base)
    best = [sampled(n, "red") for n in range(NUM_HELPFUL)]
    best += [
        sampled(100 + n, "no", category="safety", kind="safety", safety=True, id=f"safe{n}") for n in range(NUM_SAFE)
    ]
    write_lines(Path("data/rejection_sampling/v1/best.jsonl"), best)
    for name, rows in PROMPTS.items():
        write_prompts(Path(f"evaluation/{name}.jsonl"), rows)
    write_truth(
        [prompt_truth(row["id"], row["category"], risk=row.get("risk", "")) for own in PROMPTS.values() for row in own]
    )
    join_alone()
    for seed, kind in enumerate(KINDS):
        directory = Path(f"data/reward_{kind}/v1")
        write_reward(directory, base / "tokenizer.model", seed, read_config(base).vocab_size)
        write_lines(directory / "scores.jsonl", HELPFULNESS_SCORES if kind == "helpfulness" else SAFETY_SCORES)
    write_params()
    return tmp_path


def stage_of(fresh: bool = True, **changes: Any) -> Stage[Params]:
    values = {
        "init_from": "base", "samples": "data/rejection_sampling/v1", "rewards": "v1", "shares": [0, 0.5, 1],
        "num_seeds": 2, "max_prompts": None, "tokens_at_once": 200,
    }  # fmt: skip
    return stage_here("safety_scaling", Params.model_validate({**values, **changes}), fresh)


def files() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}


# --- whole runs ---


@pytest.mark.slow
def test_each_share_is_learnt_with_each_seed_beside_the_same_helpfulness_data(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt: list[dict[str, float]] = []
    real = safety_scaling.train

    def noting(stage: Stage[Any], *arguments: Any, **more: Any) -> dict[str, float]:
        learnt.append({"seed": stage.seed, **real(stage, *arguments, **more)})
        return learnt[-1]

    monkeypatch.setattr(safety_scaling, "train", noting)
    figures = run(stage_of())
    assert [figures[name] for name in ("trainings", "prompts", "prompts_too_long")] == [6, 8, 0]
    assert [each["seed"] for each in learnt] == [1, 1, 1, 2, 2, 2]
    for number, each in enumerate(learnt):
        num_safe = (0, 5, 10)[number % 3]
        # one epoch of 60 demonstrations and 30 samples, which weigh four times as much; then safety as often as these,
        # but for what the last, broken pass draws by chance
        assert each["samples/dialogues"] == pytest.approx(90 * 4 / 5, abs=6)
        assert each["own/dialogues"] == pytest.approx(90 / 5, abs=6)
        assert each.get("safety_samples/dialogues", 0) == pytest.approx(num_safe * 72 / 30, abs=6)
    runs = pandas.read_csv("out/runs.csv")
    assert sorted(zip(runs["share"], runs["safe"], runs["seed"], strict=True)) == [
        (share, safe, seed) for share, safe in ((0, 0), (0.5, 5), (1, 10)) for seed in (1, 2)
    ]
    for share in (0, 0.5, 1):
        own = runs[runs["share"] == share]
        for name in ("safety/reward", "helpfulness/reward", "safety/violations", "borderline/false_refusals"):
            assert figures[f"share_{share:g}/{name}"] == pytest.approx(own[name].mean())
            assert f"share_{share:g}/{name}/low" in figures
    scores = pandas.read_csv("out/scores.csv")
    assert len(scores) == 6 * 3 and set(scores["risk"]) == {"illicit"}
    first = scores[(scores["share"] == 0.5) & (scores["seed"] == 2)]
    assert runs[(runs["share"] == 0.5) & (runs["seed"] == 2)]["safety/reward"].item() == pytest.approx(
        first["safe_probability"].mean()
    )
    tail = pandas.read_csv("out/plots/tail.csv")
    assert tail.groupby("share")["answers"].sum().tolist() == pytest.approx([1, 1, 1])
    assert {path.stem for path in Path("out/plots").glob("*.csv")} == {"rewards", "refusals", "utilities", "tail"}
    assert Path("record/artifacts/scaling.png").stat().st_size > 0
    assert not list(Path("scratch").rglob("*.safetensors"))  # the models are gone


@pytest.mark.slow
def test_a_stopped_study_goes_on_with_the_training_that_it_was_at(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(stage_of(shares=[0, 1]))
    before = files()
    real, names = safety_scaling.try_model, []

    def stops_at_the_second(stage: Stage[Any], own: Stage[Any], *arguments: Any) -> dict[str, Any]:
        names.append(own.entry)
        if len(names) == 2:
            raise KeyboardInterrupt
        return real(stage, own, *arguments)

    monkeypatch.setattr(safety_scaling, "try_model", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(stage_of(shares=[0, 1]))
    assert run(stage_of(fresh=False, shares=[0, 1])) == whole
    assert names == ["0_safe/1", "10_safe/1", "10_safe/1", "0_safe/2", "10_safe/2"]
    assert files() == before


def test_without_a_truth_only_the_reward_models_tell(place: Path) -> None:
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("truth: truth\n  sampling", "truth: null\n  sampling"))
    figures = run(stage_of(shares=[1], max_prompts=2))
    assert figures["prompts"] == 2 + 1 + 2
    assert {name.split("/", 1)[1].removesuffix("/low").removesuffix("/high") for name in figures if "/" in name} == {
        "safety/reward", "safety/below_0.1", "safety/below_0.5", "helpfulness/reward", "borderline/reward", "steps",
    }  # fmt: skip
    assert {path.stem for path in Path("out/plots").glob("*.csv")} == {"rewards", "tail"}


DVC_STAGE = f"""\
stages:
  safety_scaling:
    cmd: exec {sys.executable} -m tasks.workers.launch safety_scaling
    deps:
    - ${{safety_scaling.init_from}}
    - ${{safety_scaling.samples}}
    params:
    - safety_scaling
    outs:
    - data/safety_scaling
"""


@pytest.mark.slow
def test_two_ranks_find_what_one_does(place: Path) -> None:
    sections = YAML(typ="safe").load(Path("params.yaml").read_text())
    found = []
    for num_ranks in (1, 2):
        root = place / f"ranks{num_ranks}"
        for name in ("base", "data", "dialogues", "evaluation", "truth"):
            shutil.copytree(place / name, root / name)
        values = stage_params(samples="data/rejection_sampling/v1", shares=[0, 1]).model_dump()
        workspace = Workspace(root, "safety_scaling", DVC_STAGE, num_ranks, safety_scaling=values, **sections)
        found.append(workspace.finish())
    alone, shared = found  # sums of gradients are rounded otherwise, so that an answer may differ
    assert set(alone) == set(shared)
    assert shared["share_1/steps"] == alone["share_1/steps"]
    assert shared["share_0/safety/reward"] == pytest.approx(alone["share_0/safety/reward"], abs=0.2)


# --- what is learnt ---


def test_a_smaller_share_is_a_part_of_a_larger_one_and_seeds_draw_others(place: Path) -> None:
    samples = read_samples(stage_of(), versions.Params.model_validate(values_of()))
    assert [len(samples.helpful), len(samples.safe), samples.num_demonstrations] == [NUM_HELPFUL, NUM_SAFE, 60]
    drawn = {
        (number, seed): [line["id"] for line in drawn_of(samples, Training(0.0, number, seed))]
        for number in range(NUM_SAFE + 1)
        for seed in (1, 2)
    }
    for (number, seed), ids in drawn.items():
        assert len(set(ids)) == number
        assert number == 0 or set(drawn[number - 1, seed]) < set(ids)
    assert drawn[NUM_SAFE, 1] == drawn[NUM_SAFE, 2] == [f"safe{n}" for n in range(NUM_SAFE)]
    assert any(drawn[number, 1] != drawn[number, 2] for number in range(NUM_SAFE))


def test_samples_that_can_not_be_learnt_are_not_counted(place: Path) -> None:
    lines = read_lines(Path("data/rejection_sampling/v1/best.jsonl"))
    lines[0]["messages"][-1]["content"] = "red " * 99  # longer than the context
    lines[-1]["messages"][-2]["content"] = "bad 1?"  # the evaluation asks the same
    write_lines(Path("data/rejection_sampling/v1/best.jsonl"), lines)
    samples = read_samples(stage_of(), versions.Params.model_validate(values_of()))
    assert [len(samples.helpful), len(samples.safe)] == [NUM_HELPFUL - 1, NUM_SAFE - 1]


def test_epochs_keep_what_is_learnt_for_helpfulness_by_hand() -> None:
    values = versions.Params.model_validate(values_of(epochs=2))
    samples = Samples([{}] * 30, [{}] * 10, num_demonstrations=60)
    assert epochs_of(values, samples, 0) == 2
    # weights 1 and 4 become 1, 4 and 4 x 10 / 30; of 90 dialogues a pass, 100: 2 x 90 x (19/3 / 5) / 100
    assert epochs_of(values, samples, 10) == pytest.approx(2 * 90 * (19 / 15) / 100)


# --- figures, by hand ---


def judged(category: str, utility: float = 0.0, risk: str | None = None, **verdict: Any) -> Judged:
    values = {
        "well_formed": True, "right": None, "refuses": False, "safe": True, "follows": None, "num_right": 0,
        "num_wrong": 0, "num_words": 3,
    }  # fmt: skip
    prompt = Prompt("p", category, [{"role": "user", "content": "x"}], risk, None, None)
    return Judged(prompt, Answer("an answer", 3, finished=True), Judgement(**{**values, **verdict}), utility, False)


def test_figures_by_hand() -> None:
    answers = [
        judged("factual", 1.0),
        judged("writing", 2.0, refuses=True),
        judged("borderline", -1.0, refuses=True),
        judged("safety", 3.0, risk="illicit", refuses=True),
        judged("safety", -1.0, risk="illicit", safe=False),
        judged("questions", 0.0, risk="illicit", safe=False),
        judged("safety", 2.0, risk="illicit"),
    ]
    assert figures_of(answers, [0.5, 0.7, 0.3, 0.9, 0.05, 0.3, 0.5]) == {
        "safety/reward": pytest.approx(1.75 / 4),
        "safety/below_0.1": 1 / 4,
        "safety/below_0.5": 2 / 4,
        "safety/utility": 1,
        "safety/refused": 1 / 4,
        "safety/violations": 2 / 4,
        "helpfulness/reward": pytest.approx(0.6),
        "helpfulness/utility": 1.5,
        "helpfulness/false_refusals": 1 / 2,
        "borderline/reward": 0.3,
        "borderline/utility": -1,
        "borderline/false_refusals": 1,
    }


def test_the_long_tail_by_hand() -> None:
    found = [
        (Training(0.0, 0, 1), {"safe": [0.05, 0.95]}),
        (Training(0.0, 0, 2), {"safe": [0.02, 0.08]}),
        (Training(1.0, 9, 1), {"safe": [0.95, 1.0]}),
    ]
    tail = tail_of(found)
    assert tail["probability"].tolist() == [0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95] * 2
    assert tail[tail["share"] == "0"]["answers"].tolist() == [0.75, *[0.0] * 8, 0.25]
    assert tail[tail["share"] == "1"]["answers"].tolist() == [*[0.0] * 9, 1.0]


def test_trainings_are_ordered_by_seed_first() -> None:
    params = stage_params(shares=[0, 0.25, 1])
    assert [(each.share, each.num_safe, each.seed) for each in trainings_of(params, 8, 5)] == [
        (share, number, seed) for seed in (5, 6) for share, number in ((0, 0), (0.25, 2), (1, 8))
    ]


def stage_params(**changes: Any) -> Params:
    values = {
        "init_from": "base", "samples": "s", "rewards": "v1", "shares": [0], "num_seeds": 2, "max_prompts": None,
        "tokens_at_once": 9,
    }  # fmt: skip
    return Params.model_validate({**values, **changes})


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"shares": [1.5]},
            r"`safety_scaling.shares` has 1.5, which is not a share of 10 samples about safety: set it",
        ),
        ({"shares": [-0.1]}, r"`safety_scaling.shares` has -0.1, which is not a share"),
        ({"shares": [0.01]}, r"`safety_scaling.shares` has 0.01, which is not a share"),
        ({"shares": [0.5, 0.52]}, r"`safety_scaling.shares` \[0.5, 0.52\] has 5 samples twice: the repetition would"),
        ({"rewards": "v2"}, r"data/reward_helpfulness/v2/scores.jsonl is missing: run stage `reward_helpfulness@v2`"),
        ({"samples": "none"}, r"none/best.jsonl is missing, though `safety_scaling.samples` names its directory"),
    ],
)
def test_a_study_of_what_does_not_exist_is_refused(place: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(stage_of(**changes))
    assert not list(Path("scratch").rglob("resume"))


@pytest.mark.parametrize(("kept", "missing"), [(True, "helpfulness"), (False, "safety")])
def test_samples_of_one_kind_alone_are_refused(place: Path, kept: bool, missing: str) -> None:
    path = Path("data/rejection_sampling/v1/best.jsonl")
    write_lines(path, [line for line in read_lines(path) if line["safety"] == kept])
    with pytest.raises(ValueError, match=rf"v1/best.jsonl holds no sample about {missing}: name samples of both in"):
        run(stage_of())


def test_an_evaluation_without_a_kind_of_prompt_is_refused(place: Path) -> None:
    write_prompts(Path("evaluation/safety.jsonl"), [{**PROMPTS["safety"][0], "messages": turns("bad? " * 90)}])
    with pytest.raises(
        ValueError,
        match=r"the 6 prompts of `evaluate.prompts` that are asked hold none about safety that fits into base's "
        r"context of 64 tokens: nothing to try the models on",
    ):
        run(stage_of())


def test_samples_that_fine_tuning_would_not_learn_or_could_not_tell_apart_are_refused(place: Path) -> None:
    values = values_of()
    write_params(samples={**values["samples"], "weight": 0})
    with pytest.raises(ValueError, match=r"`fine_tuning.samples.weight` is 0: no sample would be learnt; raise it"):
        run(stage_of())
    write_params(sources={**values["sources"], "safety_samples": values["sources"]["own"]})
    with pytest.raises(
        ValueError, match=r"a source of `fine_tuning` can't be called `safety_samples`, as this study's"
    ):
        run(stage_of())


def test_a_reward_model_of_another_tokenizer_is_refused(place: Path) -> None:
    other = train_tokenizer(place, ["quite another set of texts, 7 of them", "the sky is blue, and so on 12"], 300)
    Path("data/reward_safety/v1/tokenizer.model").write_bytes(Path(other).read_bytes())
    with pytest.raises(
        ValueError, match=r"data/reward_safety/v1/tokenizer.model is another tokenizer than base/tokeniz"
    ):
        run(stage_of())


def test_what_was_found_of_a_model_is_kept_until_the_end(place: Path) -> None:
    figures = run(stage_of(shares=[0.5]))
    found = [read_json(Path(f"scratch/5_safe/{seed}/found.json")) for seed in (1, 2)]
    mean = sum(each["figures"]["safety/reward"] for each in found) / 2
    assert figures["share_0.5/safety/reward"] == pytest.approx(mean)
    assert [len(each["safe"]) for each in found] == [3, 3]
