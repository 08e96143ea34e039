from __future__ import annotations

import json
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ranks import TRAINED, join_alone
from ruamel.yaml import YAML
from stages import Workspace, stage_here
from test_sft import COLOURS, EVALUATE, WATCHED, base, turns, write_dialogues  # noqa: F401 - a fixture

from model.text.tokenizer import Tokenizer
from tasks import controls, fine_tuning
from tasks.learning import answers, versions
from tasks.learning.loop import digest_of
from tasks.running.params import parse_section
from tasks.running.stage import Stage

NOTHING = "data/seeds/none"
ROUND = {
    "newest": "base", "earlier": "early", "batches": "public", "samples": NOTHING, "distil_from": NOTHING,
    "ghost_attention": NOTHING, "context_distillation": NOTHING,
}  # fmt: skip
NO_DATA_SETS = {"ghost_attention": NOTHING, "context_distillation": NOTHING}
VERSION = {"init_from": "base", "steps_of": "data/fine_tuning/v1", "length": "steps", **NO_DATA_SETS}
CONTROLS: dict[str, dict[str, str]] = {
    "alone": {**VERSION, "samples": NOTHING, "answers": "none"},
    "random": {**VERSION, "samples": "data/rejection_sampling/v1", "answers": "random"},
    "again": {**VERSION, "samples": "data/rejection_sampling/v1", "answers": "best"},
}
SAMPLES = {"max_dialogues": None, "validation_share": 0, "weight": 4, "loss": "last"}


def values_of(**changes: Any) -> dict[str, Any]:
    watched = {name: value for name, value in WATCHED.items() if name not in ("init_from", "early_share", "num_ranks")}
    own = {"batch_rows": 4, "micro_batch_rows": 2, "epochs": 2, "samples": SAMPLES, "samples_per_category": 0}
    own |= dict.fromkeys(NO_DATA_SETS, SAMPLES)
    own["init_from"] = "base"
    return {**TRAINED, **watched, **own, **changes}


def write_params(root: Path, entries: Any = CONTROLS, joined: Any = NO_DATA_SETS, **changes: Any) -> None:
    sections = {"fine_tuning": values_of(**changes), "evaluate": EVALUATE, "controls": entries}
    with (root / "params.yaml").open("w") as file:
        YAML().dump({"rounds": {"v1": {**ROUND, **joined}}, **sections}, file)


def sampled(number: int, answer: str, **changes: Any) -> dict[str, Any]:
    """A sample; the answer that it follows was written carelessly."""
    asked = turns("the sky?", "bluen", f"{number}: the {sorted(COLOURS)[number % 6]}?", answer)
    about = {"category": "factual", "kind": "helpfulness", "safety": False, "source": "v1"}
    return {"id": f"s{number}", "messages": asked, **about, **changes}


def write_samples(root: Path) -> None:
    """The best samples are right, the random ones are all `red`."""
    directory = root / "data/rejection_sampling/v1"
    directory.mkdir(parents=True)
    names = sorted(COLOURS)
    for file, rows in (
        ("best", [sampled(number, COLOURS[names[number % 6]]) for number in range(100, 140)]),
        ("random", [sampled(number, "red") for number in range(100, 140)]),
    ):
        (directory / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_all(root: Path, base: Path) -> None:  # noqa: F811
    shutil.copytree(base, root / "base")
    write_dialogues(root / "dialogues")
    write_samples(root)
    (root / "evaluation").mkdir()
    (root / "evaluation/asked.jsonl").write_text('{"prompt": "Who paints the sea?"}\n')


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: Path) -> Path:  # noqa: F811
    monkeypatch.chdir(tmp_path)
    write_all(tmp_path, base)
    write_params(tmp_path)
    join_alone()
    return tmp_path


def version(**changes: Any) -> Stage[versions.Params]:
    return stage_here("fine_tuning@v1", versions.Params.model_validate(values_of(**changes)))


def control(name: str, entries: Any = CONTROLS) -> Stage[controls.Params]:
    return stage_here(f"controls@{name}", parse_section(controls.Params, {"controls": entries}, "controls"))


def write_steps(num_steps: int) -> None:
    Path("data/fine_tuning/v1").mkdir(parents=True)
    Path("data/fine_tuning/v1/metrics.json").write_text(json.dumps({"steps": num_steps}))


def losses() -> list[float]:
    """The training loss of each logged step."""
    lines = [json.loads(line)["metrics"] for line in Path("record/metrics.jsonl").read_text().splitlines()]
    return [metrics["train/loss"] for metrics in lines if "train/loss" in metrics]


def test_a_version_learns_samples_and_demonstrations_by_their_weights(place: Path) -> None:
    figures = fine_tuning.run(version())
    # 2 x 100 dialogues, four fifths from the 40 samples
    assert (figures["samples/dialogues"], figures["own/dialogues"]) == (160, 40)
    assert (figures["samples/epochs"], figures["own/epochs"]) == (4, 40 / 60)
    assert figures["validation/all/loss"] == figures["validation/all/best_loss"] < 3
    assert not Path("out/early").exists()
    training = json.loads(Path("out/training.json").read_text())
    assert training["base_sha256"] == digest_of(Path("base")) and "control_of" not in training
    assert {"config.json", "model.safetensors", "too_long.jsonl", "refused.jsonl"} <= {
        p.name for p in Path("out").iterdir()
    }


def test_of_a_sample_only_the_last_answer_is_learnt_and_of_a_demonstration_each(place: Path) -> None:
    params = versions.Params.model_validate(values_of())
    tokenizer = Tokenizer(Path("base/tokenizer.model"))
    folders = versions.folders_of(params, Path("data/rejection_sampling/v1/best.jsonl"), {})
    data = answers.read_data(folders, params, tokenizer, 1, "fine_tuning")
    assert [(name, len(pool.numbers), pool.weight) for name, pool in data.pools.items()] == [
        ("own", 60, 1.0),
        ("samples", 40, 4.0),
    ]
    ends = {
        name: {sum(data.train[number].ids[data.train[number].is_learnt] == tokenizer.eos_id) for number in pool.numbers}
        for name, pool in data.pools.items()
    }
    assert ends == {"own": {1, 2}, "samples": {1}}
    assert {Counter(data.train[number].ids.tolist())[tokenizer.eos_id] for number in data.pools["samples"].numbers} == {
        2
    }


def test_samples_that_answer_what_the_evaluation_asks_are_left_out(place: Path) -> None:
    Path("evaluation/asked.jsonl").write_text('{"prompt": "103: the grass"}\n')
    figures = fine_tuning.run(version(epochs=1))
    assert (figures["dialogues"], figures["dialogues_in_evaluation"]) == (99, 1)
    (refused,) = map(json.loads, Path("out/refused.jsonl").read_text().splitlines())
    assert (refused["id"], refused["error"]) == ("s103", "the evaluation asks the same")


def test_missing_samples_are_refused(place: Path) -> None:
    Path("data/rejection_sampling/v1/best.jsonl").unlink()
    with pytest.raises(ValueError, match=r"data/rejection_sampling/v1/best.jsonl holds no samples: run the stage rej"):
        fine_tuning.run(version())


def test_a_round_that_asked_nothing_has_no_version_and_no_controls(place: Path) -> None:
    Path("data/rejection_sampling/v1/best.jsonl").write_text("")
    assert fine_tuning.run(version()) == {"steps": 0}
    assert list(Path("out").glob("*")) == []
    write_steps(0)
    with pytest.raises(ValueError, match=r"data/fine_tuning/v1 is no version, as its round's rejection sampling ask"):
        controls.run(control("alone"))


def test_samples_too_long_for_the_context_are_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"source `samples` has weight 4, but no dialogue to learn from"):
        fine_tuning.run(version(context=35))


def test_data_sets_of_the_round_join_its_samples_and_controls_leave_them_out(place: Path) -> None:
    path = Path("data/ghost_attention/v1/dialogues.jsonl")
    path.parent.mkdir(parents=True)
    asked = turns("?", "no", "?", "red")
    instructed = [{"role": "system", "content": "x"}, *asked]
    rows = [{"id": f"g{number}", "messages": instructed, "category": "instruction"} for number in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    empty = Path("data/context_distillation/v1/dialogues.jsonl")
    empty.parent.mkdir(parents=True)
    empty.write_text("")  # nothing was kept
    joined = {"ghost_attention": str(path.parent), "context_distillation": str(empty.parent)}
    write_params(place, joined=joined)
    figures = fine_tuning.run(version())
    assert figures["ghost_attention/dialogues"] > 0
    assert "context_distillation/dialogues" not in figures
    params = versions.Params.model_validate(values_of())
    tokenizer = Tokenizer(Path("base/tokenizer.model"))
    samples = Path("data/rejection_sampling/v1/best.jsonl")
    folders = versions.folders_of(params, samples, {"ghost_attention": path.parent})
    data = answers.read_data(folders, params, tokenizer, 1, "fine_tuning")
    learnt = [data.train[number] for number in data.pools["ghost_attention"].numbers]
    texts = {tokenizer.decode(each.ids[each.is_learnt].tolist()).strip() for each in learnt}
    assert texts == {"red"}  # and no token of an earlier turn
    assert {int(each.ids[each.is_learnt][-1]) for each in learnt} == {tokenizer.eos_id}
    assert {int(each.ids[~each.is_learnt].tolist().count(tokenizer.eos_id)) for each in learnt} == {1}
    write_steps(int(figures["steps"]))
    without = {"again": {**CONTROLS["again"], "ghost_attention": NOTHING}}
    with_it = {"again": {**CONTROLS["again"], "ghost_attention": str(path.parent)}}
    assert "ghost_attention/dialogues" not in controls.run(control("again", without))
    as_long = {"again": {**with_it["again"], "length": "passes"}}
    assert controls.run(control("again", as_long)) == figures  # the version itself


def test_a_missing_data_set_is_refused(place: Path) -> None:
    write_params(place, joined={"ghost_attention": "data/ghost_attention/v1"})
    with pytest.raises(ValueError, match=r"v1/dialogues.jsonl holds no ghost_attention: run the stage ghost_attention"):
        fine_tuning.run(version())


@pytest.mark.parametrize("name", ["samples", "ghost_attention", "context_distillation"])
def test_no_source_may_be_called_as_what_a_round_has(place: Path, name: str) -> None:
    sources = {**WATCHED["sources"], name: WATCHED["sources"]["own"]}
    with pytest.raises(ValueError, match=rf"`fine_tuning` is .*a source can't be called `{name}`, as what rounds have"):
        parse_section(versions.Params, {"fine_tuning": values_of(sources=sources)}, "fine_tuning")


# --- controls ---


def test_controls_take_the_versions_steps_from_its_start_on_other_answers(place: Path) -> None:
    changes = {"epochs": 1, "log_every": 1}
    fine_tuned = fine_tuning.run(version(**changes))
    steps, of_version = int(fine_tuned["steps"]), losses()
    write_params(place, **changes)
    write_steps(steps)
    found, learnt = {}, {}
    for name in CONTROLS:
        found[name] = controls.run(control(name))
        learnt[name] = losses()
        training = json.loads(Path("out/training.json").read_text())
        assert (training["control_of"], training["step"]) == ("data/fine_tuning/v1", steps)
        assert training["base_sha256"] == digest_of(Path("base"))
    assert {name: figures["steps"] for name, figures in found.items()} == dict.fromkeys(CONTROLS, steps)
    assert {len(losses) for losses in learnt.values()} == {steps}
    assert "samples/dialogues" not in found["alone"]
    assert found["alone"]["own/dialogues"] > fine_tuned["own/dialogues"]
    # the version's own samples once more teach the same, up to its last step, which may have fewer rows
    assert learnt["again"][:-1] == of_version[:-1]
    assert learnt["random"][:-1] != of_version[:-1]
    for name in ("random", "again"):
        assert 0 <= found[name]["samples/dialogues"] - fine_tuned["samples/dialogues"] < 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"steps_of": "data/ppo/v2"},
            r"data/ppo/v2/metrics.json is missing: a control takes as many steps as its version; run ppo@v2",
        ),
        (
            {"samples": "data/rejection_sampling/v7"},
            r"data/rejection_sampling/v7/random.jsonl holds no samples: run the",
        ),
    ],
)
def test_a_control_of_what_does_not_exist_is_refused(place: Path, changes: dict[str, str], message: str) -> None:
    entries = {"random": {**CONTROLS["random"], **changes}}
    write_params(place, entries)
    write_steps(10)
    with pytest.raises(ValueError, match=message):
        controls.run(control("random", entries))


def test_a_control_without_its_version_or_start_is_refused(place: Path) -> None:
    with pytest.raises(ValueError, match=r"data/fine_tuning/v1/metrics.json is missing: .*; run fine_tuning@v1"):
        controls.run(control("alone"))
    write_steps(10)
    shutil.rmtree("base")
    with pytest.raises(ValueError, match=r"base/config.json is missing: base is not a Hugging Face checkpoint"):
        controls.run(control("alone"))
    with pytest.raises(
        ValueError, match=r"`controls` has no `other`: it has controls@alone, controls@random, controls@"
    ):
        controls.run(control("other"))
    with pytest.raises(ValueError, match=r"`controls` has no `other`: it has none"):
        controls.run(control("other", {}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"answers": "worst"},
            r"`controls.random.answers` is 'worst': .*'none', 'random' or 'best' \(samples that are l",
        ),
        (
            {"samples": NOTHING},
            r"answers random with samples data/seeds/none: `none` goes with data/seeds/none, `random`",
        ),
        ({"answers": "none"}, r"answers none with samples data/rejection_sampling/v1: `none` goes with"),
        ({"answer": "best"}, r"`controls.random.answer` is not a parameter; did you mean `controls.random.answers`\?"),
    ],
)
def test_a_wrong_control_is_told(changes: dict[str, str], message: str) -> None:
    entries = {**CONTROLS, "random": {**CONTROLS["random"], **changes}}
    with pytest.raises(ValueError, match=message):
        parse_section(controls.Params, {"controls": entries}, "controls")


def test_training_that_failed_names_the_section_whose_values_are_used(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps(10)
    real = answers.train_step
    monkeypatch.setattr(
        answers, "train_step", lambda engine, batches, loss, count, accepts: real(engine, batches, loss, 0, accepts)
    )
    with pytest.raises(ValueError, match=r"step 1: loss (inf|nan).*Lower `fine_tuning\.learning_rate`, or look at"):
        controls.run(control("random"))


# --- whole runs in processes of their own ---

DVC_STAGE = f"""\
stages:
  fine_tuning:
    foreach: ${{rounds}}
    do:
      cmd: exec {sys.executable} -m tasks.workers.launch fine_tuning ${{key}}
      deps:
      - ${{item.newest}}
      - data/rejection_sampling/${{key}}
      - dialogues
      - evaluation
      params: [seed, evaluate, fine_tuning]
      outs: ["data/fine_tuning/${{key}}"]
  controls:
    foreach: ${{controls}}
    do:
      cmd: exec {sys.executable} -m tasks.workers.launch controls ${{key}}
      deps:
      - ${{item.init_from}}
      - ${{item.samples}}
      - ${{item.steps_of}}/metrics.json
      - dialogues
      - evaluation
      params: [seed, evaluate, fine_tuning, "controls.${{key}}"]
      outs: ["data/controls/${{key}}"]
"""


def workspace_of(root: Path, base: Path, name: str, entries: Any = CONTROLS, **changes: Any) -> Workspace:  # noqa: F811
    write_all(root, base)
    (root / "data/seeds").mkdir()
    (root / NOTHING).touch()
    sections = {"rounds": {"v1": ROUND}, "fine_tuning": values_of(**changes), "evaluate": EVALUATE, "controls": entries}
    return Workspace(root, name, DVC_STAGE, **sections)


@pytest.mark.slow
def test_a_killed_version_resumes_to_the_same_bytes(tmp_path: Path, base: Path) -> None:  # noqa: F811
    settings = {"precision": "bf16", "zero_stage": 1, "epochs": 6}
    undisturbed = workspace_of(tmp_path / "undisturbed", base, "fine_tuning v1", **settings)
    undisturbed.finish()
    disturbed = workspace_of(tmp_path / "disturbed", base, "fine_tuning v1", **settings)
    disturbed.kill_at(4, signal.SIGKILL)
    disturbed.kill_at(16, signal.SIGTERM)
    assert not disturbed.output.exists()
    disturbed.finish()
    assert disturbed.files == undisturbed.files


@pytest.mark.slow
def test_dvc_trains_a_version_and_its_control_and_another_control_leaves_both_as_they_are(
    tmp_path: Path,
    base: Path,  # noqa: F811
) -> None:
    whole = workspace_of(tmp_path, base, "controls alone", {"alone": CONTROLS["alone"]})
    steps = whole.repro()["steps"]
    assert json.loads((tmp_path / "data/fine_tuning/v1/metrics.json").read_text())["steps"] == steps
    params = YAML(typ="safe").load((tmp_path / "params.yaml").read_text())
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump({**params, "controls": CONTROLS}, file)
    before = (whole.output / "training.json").stat().st_mtime_ns
    whole.repro()
    assert (whole.output / "training.json").stat().st_mtime_ns == before
