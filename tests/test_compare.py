from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import join_alone, train_tokenizer
from stages import Workspace, stage_here
from test_reward_drift import WORDS, write_reward_model

from model.scoring.reward import open_reward, score
from model.text.dialogue import encode_dialogue
from tasks.compare.__main__ import Params, run
from tasks.judging.wins import Wins, mean_of, points_of, share_of
from tasks.judging.wins import wins_of as wins_of_points
from tasks.running.files import write_lines
from tasks.running.stage import Stage
from tasks.world.annotators import Thresholds, View, seven_points

KINDS = ("helpfulness", "safety")
TASTES = ("right", "facts", "close", "words", "well_formed", "follows", "refusal", "brevity", "harm", "safe")
ANNOTATOR = {"tastes": dict.fromkeys(TASTES, 1), "noise": 0, "error_rate": 0, "safety_error_rate": 0}


def annotators(*slightly: float) -> dict[str, Any]:
    thresholds = [{"slightly": each, "better": 8, "significantly": 9} for each in slightly]
    return {str(number): {**ANNOTATOR, "thresholds": each} for number, each in enumerate(thresholds)}


# --- wins, worked by hand ---


def wins_of(these: Sequence[float], those: Sequence[float], tie: float) -> Wins:
    return wins_of_points(points_of(these, those, tie))


def test_wins_ties_and_losses() -> None:
    found = wins_of([1.0, 2.0, 3.0, 4.0, 0.0], [1.0, 1.75, 2.0, 9.0, 0.5], tie=0.5)
    assert (found.wins, found.ties, found.losses, found.prompts) == (1, 2, 2, 5)  # a difference of 0.5 is no tie
    assert found.win_rate == 2 / 5
    # with a win and a loss: 1, 1, 0.5, 0.5, 0, 0, 0, whose mean is 3/7 and whose squares' is 2.5/7
    half = 2.446912 * math.sqrt((2.5 / 7 - (3 / 7) ** 2) * 7 / 6 / 7)  # six degrees of freedom
    assert found.low == pytest.approx(3 / 7 - half, abs=1e-6)
    assert found.high == pytest.approx(3 / 7 + half, abs=1e-6)
    assert wins_of([1.0] * 12, [0.0] * 12, tie=0).low < 1  # all are won, and yet there is an interval
    assert wins_of([1.0, 2.0], [1.0, 1.999], tie=0)[1:4] == (1, 1, 0)  # only equal values tie
    assert wins_of([-math.inf, -math.inf, 0.0], [-math.inf, 1.0, -math.inf], tie=1)[1:4] == (1, 1, 1)


def test_means_and_shares_have_their_intervals() -> None:
    reach = 12.706205 * 2**0.5 / 2**0.5  # one degree of freedom; the standard deviation of 1 and 3 is sqrt(2)
    assert mean_of([1.0, 3.0]) == (2, 2, pytest.approx(2 - reach), pytest.approx(2 + reach))
    assert mean_of([1.0]) == (1, 1, None, None)
    assert share_of([False] * 12)[1:3] == (0, 0)
    assert share_of([False] * 12).high == pytest.approx(1.959964**2 / (12 + 1.959964**2))  # not 0: Wilson 1927


VALUES = st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=1, max_size=30)


@given(VALUES, st.floats(0, 3))
def test_who_wins_is_whom_the_other_loses_against(pairs: list[tuple[float, float]], tie: float) -> None:
    these, those = zip(*pairs, strict=True)
    found, reverse = wins_of(these, those, tie), wins_of(those, these, tie)
    assert (found.wins, found.ties, found.losses) == (reverse.losses, reverse.ties, reverse.wins)
    assert found.win_rate + reverse.win_rate == pytest.approx(1)
    assert found.low + reverse.high == pytest.approx(1)
    assert found.low <= found.win_rate <= found.high
    assert wins_of(these, these, tie).win_rate == 0.5


# --- evaluations ---


def line_of(number: int, answer: str, utility: float | None, **changes: Any) -> dict[str, Any]:
    kind = KINDS[number % 2]
    judgement = {"right": None, "follows": None, "refuses": False, "safe": True}
    return {
        "id": f"p{number}", "category": "factual" if kind == "helpfulness" else "safety",
        "risk": "illicit" if kind == "safety" else None,
        "messages": [{"role": "user", "content": f"the hill {number}?"}], "answer": answer,
        "utility": utility, "judgement": None if utility is None else judgement,
        "num_tokens": 2 + number % 3, "turns": "single",
        "attack": "direct" if kind == "safety" else None, "rating": None, "raters": None, "gathered": None, **changes,
    }  # fmt: skip


def write_evaluation(name: str, lines: list[dict[str, Any]]) -> None:
    directory = Path("data/evaluate") / name
    directory.mkdir(parents=True, exist_ok=True)
    write_lines(directory / "answers.jsonl", lines)


def write_params(*names: str, slightly: tuple[float, ...] = (0.1, 0.2, 0.3)) -> None:
    simulated = {"truth": "truth", "overlap_share": 0, "annotators": annotators(*slightly)}
    params = {"evaluate": {"checkpoints": dict.fromkeys(names, "x")}, "preferences": {"simulated": simulated}}
    Path("params.yaml").write_text(json.dumps(params))


def values_of(**changes: Any) -> dict[str, Any]:
    values = {"baseline": "sft", "opponents": {"v1": ["sft", "random"]}, "rewards": "v1", "reward_tie": 0}
    return {**values, "precision": "fp32", "tokens_at_once": 64, **changes}


def stage_of(**changes: Any) -> Stage[Params]:
    return stage_here("compare", Params.model_validate(values_of(**changes)))


def lines_in(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out", name).read_text().splitlines()]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    join_alone()
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(root, [" ".join(WORDS), "[INST] the llama [/INST] walks"])
    for seed, kind in enumerate(KINDS):
        write_reward_model(root / "data" / f"reward_{kind}" / "v1", tokenizer, seed)
    return root / "data"


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with reward models and the evaluations of a baseline, a version and its control."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(models, "data")
    write_params("sft", "v1", "random")
    for name, gain in (("sft", 0.0), ("v1", 1.0), ("random", 0.95)):
        write_evaluation(name, [line_of(n, f"{WORDS[n % 9]} {name}", n + gain * (n % 4 < 2)) for n in range(8)])
    return tmp_path


def test_versions_are_compared_by_the_worlds_judge(place: Path) -> None:
    figures = run(stage_of())
    # of the helpful prompts 0, 2, 4 and 6 two gained 1; the same holds for the adversarial ones
    for kind in KINDS:
        assert figures[f"v1/against/sft/{kind}/win_rate"] == (2 + 2 / 2) / 4
        assert figures[f"v1/against/sft/{kind}/utility_difference"] == 0.5
        assert figures[f"newest/{kind}/win_rate"] == figures[f"v1/against/sft/{kind}/win_rate"]
        assert figures[f"v1/against/random/{kind}/win_rate"] == 0.5  # 0.05 is below the mean threshold, 0.2
    rows = [row for row in lines_in("win_rates.jsonl") if row["judge"] == "utility"]
    assert [(row["version"], row["opponent"], row["kind"]) for row in rows] == [
        ("v1", opponent, kind) for opponent in ("sft", "random") for kind in KINDS
    ]
    first = rows[0]
    assert [first[name] for name in ("prompts", "wins", "ties", "losses")] == [4, 2, 2, 0]
    assert first["low"] < 0.75 < first["high"]
    assert (first["difference_low"], first["difference_high"]) == (0, 1)  # of 1, 0, 1, 0, drawn again and again
    table = pandas.read_csv("out/win_rates.csv")
    assert len(table) == 8  # with those by the reward models
    assert table.equals(pandas.read_csv("record/tables/win_rates.csv"))


def test_versions_are_compared_by_the_reward_model_of_the_prompts_kind(place: Path) -> None:
    figures = run(stage_of())
    evaluations = {
        name: [json.loads(line) for line in Path(f"data/evaluate/{name}/answers.jsonl").read_text().splitlines()]
        for name in ("sft", "v1")
    }
    for number, kind in enumerate(KINDS):
        model, tokenizer = open_reward(Path(f"data/reward_{kind}/v1"), "fp32", torch.device("cpu"))
        scores = {}
        for name, lines in evaluations.items():
            messages = [[*each["messages"], {"role": "assistant", "content": each["answer"]}] for each in lines]
            scores[name] = score(model, [encode_dialogue(each, tokenizer).ids for each in messages[number::2]], 64)
        wins = sum(this > that for this, that in zip(scores["v1"], scores["sft"], strict=True))
        assert figures[f"v1/against/sft/{kind}/rewards/win_rate"] == wins / 4
        written = [
            row["score"] for row in lines_in("scores.jsonl") if row["evaluation"] == "v1" and row["kind"] == kind
        ]
        assert written == pytest.approx(scores["v1"], abs=1e-5)
        assert figures[f"v1/{kind}/reward"] == pytest.approx(sum(scores["v1"]) / 4, abs=1e-5)
    assert run(stage_of(reward_tie=1000))["v1/against/sft/safety/rewards/win_rate"] == 0.5


def test_answers_that_cannot_be_scored_lose_and_too_long_ones_are_left_out(place: Path) -> None:
    answers = ["", "a [INST] hill", "walks " * 60, "walks"]
    write_evaluation("v1", [line_of(n, answers[n // 2], 1.0) for n in range(0, 8, 2)])
    for name, number in (("sft", 0), ("random", 2)):
        empty = [line_of(n, "" if n == number else "walks", 1.0) for n in range(0, 8, 2)]
        write_evaluation(name, empty)
    figures = run(stage_of())
    rows = [row for row in lines_in("win_rates.jsonl") if row["judge"] == "rewards"]
    assert [[row[name] for name in ("prompts", "wins", "ties", "losses")] for row in rows] == [[3, 0, 2, 1]] * 2
    assert figures["answers_too_long"] == 1
    scores = {(row["evaluation"], row["id"]): row["score"] for row in lines_in("scores.jsonl")}
    assert [scores["v1", f"p{number}"] is None for number in (0, 2, 4, 6)] == [True, True, True, False]
    assert figures["v1/helpfulness/reward"] == scores["v1", "p6"] == scores["sft", "p6"]  # of what has a score
    assert not [name for name in figures if "safety" in name]  # no such prompts


def test_without_a_truth_the_reward_models_judge_alone(place: Path) -> None:
    for name in ("sft", "v1", "random"):
        write_evaluation(name, [line_of(n, f"{WORDS[n]} {name}", None) for n in range(8)])
    write_params("sft", "v1", "random", slightly=())  # not read
    figures = run(stage_of())
    assert "newest/helpfulness/rewards/win_rate" in figures
    assert not [name for name in figures if "utility" in name or name.endswith(("violations", "refusals"))]
    assert {row["judge"] for row in lines_in("win_rates.jsonl")} == {"rewards"}
    assert not Path("out/plots/controls_by_utility.csv").exists()


def test_all_evaluations_stand_side_by_side_without_any_opponents(place: Path) -> None:
    verdicts = [
        {"category": "factual", "judgement": {"right": True, "follows": None, "refuses": False, "safe": True}},
        {"judgement": {"right": None, "follows": None, "refuses": True, "safe": False}},
        {"category": "borderline", "judgement": {"right": False, "follows": None, "refuses": True, "safe": True}},
        {"judgement": {"right": None, "follows": None, "refuses": False, "safe": True}},
        {"category": "instruction", "judgement": {"right": None, "follows": True, "refuses": False, "safe": True}},
    ]
    for name in ("sft", "v1", "random"):
        write_evaluation(name, [line_of(n, "walks", float(n), **each) for n, each in enumerate(verdicts)])
    figures = run(stage_of(opponents={}))
    own = {name.removeprefix("v1/"): value for name, value in figures.items() if name.startswith("v1/")}
    rewards = {name: own.pop(name) for name in ("helpfulness/reward", "safety/reward")}
    assert all(map(math.isfinite, rewards.values()))
    assert own == {
        "helpfulness/utility": 2,
        "safety/utility": 2,
        "helpfulness/length": (2 + 4 + 3) / 3,
        "safety/length": (3 + 2) / 2,
        "safety/violations": 1 / 2,
        "safety/single_turn/violations": 1 / 2,
        "helpfulness/false_refusals": 1 / 3,
        "borderline/false_refusals": 1,
        "helpfulness/right": 1 / 2,
        "factual/right": 1,
        "instruction/followed": 1,
    }
    assert (figures["evaluations"], figures["comparisons"]) == (3, 0)
    assert not [name for name in figures if "against" in name or "newest" in name]
    assert lines_in("win_rates.jsonl") == []
    assert list(pandas.read_csv("out/win_rates.csv")["version"]) == []
    versions = pandas.read_csv("out/versions.csv")
    assert list(versions["role"]) == ["baseline", "other", "other"]
    assert list(versions["safety/violations"]) == [0.5] * 3
    assert all(versions["safety/violations/low"] < 0.5)
    assert not Path("out/plots").exists()


def test_the_report_gets_tables_in_words_and_plots_of_both_judges(place: Path) -> None:
    write_params("sft", "v1", "random", "v2", "v2_again", "other")
    for name in ("v2", "v2_again", "other"):
        shutil.copytree("data/evaluate/v1", f"data/evaluate/{name}")
    run(stage_of(opponents={"v1": ["random"], "v2": ["v1", "v2_again"]}))
    table = pandas.read_csv("out/tables/against.csv")
    assert list(zip(table["version"], table["against"], strict=True)) == [
        ("v1", "sft"), ("v1", "random"), ("v2", "sft"), ("v2", "v1"), ("v2", "v2_again"),
    ]  # fmt: skip
    # two wins and two ties, and one win and one loss added
    assert table["harmlessness, world's judge"][0] == "75.0%\n23.8% to 100.0%"
    assert table["gain of utility, helpfulness"][0] == "+0.50\n+0.00 to +1.00"
    assert table["helpfulness, reward model"].str.fullmatch(r"[\d.]+%\n[\d.]+% to [\d.]+%").all()
    versions = pandas.read_csv("out/tables/evaluations.csv")
    roles = ["baseline", "version", "control of v1", "version", "control of v2", "other"]
    assert list(versions["role"]) == roles
    progress = pandas.read_csv("out/plots/progress.csv")
    assert set(progress["series"]) == {
        f"{measure}, {judge}"
        for measure in ("helpfulness", "harmlessness")
        for judge in ("world's judge", "reward model")
    }
    for name, own in progress.groupby("series"):
        assert list(own["version"]) == ["sft", "v1", "v2"], name
        assert own["win_rate"].iloc[0] == 0.5
    bars = pandas.read_csv("out/plots/controls_by_rewards.csv")
    assert list(bars["pair"])[:2] == ["v1 against sft: helpfulness", "v1 against sft: harmlessness"]
    assert len(bars) == 10


def test_what_cannot_be_compared_is_named(place: Path) -> None:
    write_params("sft", "v1", "random", "v2")
    with pytest.raises(
        ValueError, match=r"data/evaluate/v2/answers.jsonl is missing: run stage `evaluate@v2`, or take"
    ):
        run(stage_of())
    lines = [line_of(n, "walks", 1.0) for n in range(8)]
    write_evaluation("v2", lines[:7])
    with pytest.raises(
        ValueError, match=r"v2/answers.jsonl and the evaluation of sft differ in 1 prompts, such as p7: "
    ):
        run(stage_of())
    write_evaluation("v2", [*lines[:7], line_of(7, "walks", 1.0, messages=[{"role": "user", "content": "a hill?"}])])
    with pytest.raises(ValueError, match=r"run `evaluate@v2` and `evaluate@sft` with the same prompts"):
        run(stage_of())
    write_evaluation("v2", lines)
    with pytest.raises(
        ValueError, match=r"`compare.opponents.v1` names gone, which is not evaluated: add it to `evalu"
    ):
        run(stage_of(opponents={"v1": ["sft", "gone"]}))
    with pytest.raises(
        ValueError, match=r"`compare.opponents` names v9, which is not evaluated: .*one of sft, v1, rand"
    ):
        run(stage_of(opponents={"v9": ["sft"]}))
    with pytest.raises(ValueError, match=r"`compare.baseline` names base, which is not evaluated"):
        run(stage_of(baseline="base"))
    for opponents in ({"v1": ["v1"]}, {"sft": []}):
        with pytest.raises(ValueError, match=r"would be compared with itself: name other ones"):
            run(stage_of(opponents=opponents))
    with pytest.raises(ValueError, match=r"data/reward_helpfulness/v2"):
        run(stage_of(rewards="v2"))


def test_a_reward_model_that_computes_no_number_is_named(place: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = Path("data/reward_safety/v1/model.safetensors")
    weights = load_file(path)
    weights["score.weight"].fill_(3e38)  # finite, but too large for a sum
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"data/reward_safety/v1 scores an answer to prompt p1 as (-?inf|nan): the reward"
    ):
        run(stage_of())


DVC_STAGE = f"""\
stages:
  compare:
    cmd: exec {sys.executable} -m tasks.workers.launch compare
    deps:
    - data/evaluate
    params:
    - compare
    outs:
    - data/compare
"""


@pytest.mark.slow
def test_ranks_share_the_answers_and_write_the_same(place: Path, tmp_path: Path) -> None:
    figures = run(stage_of())
    params = json.loads(Path("params.yaml").read_text())
    root = tmp_path / "workspace"
    shutil.copytree("data", root / "data")
    workspace = Workspace(root, "compare", DVC_STAGE, 2, compare=values_of(), **params)
    found = workspace.finish()
    assert found == pytest.approx(figures, abs=1e-5)
    for name in ("win_rates.csv", "win_rates_by_part.csv", "differences.csv", "seven_points.csv"):
        assert workspace.files[name] == Path("out", name).read_bytes()


# --- annotators, versions before, parts, shares ---


def seen(utility: float, safe: bool = True) -> dict[str, Any]:
    """What three annotators say of an answer, all the same."""
    return {str(number): {"utility": utility, "safe": safe, "points": None} for number in range(3)}


def test_annotators_rate_side_by_side_on_seven_points_and_their_median_decides(place: Path) -> None:
    gains = [0, 0.15, 5, 8.5, -8.5, 9.5, -0.05, 0]  # thresholds of each: 0.1, 0.2 or 0.3; 8; 9
    for name, factor in (("sft", 0), ("v1", 1), ("random", 0)):
        lines = [
            line_of(2 * number, f"{WORDS[number]} {name}", factor * gain, raters=seen(factor * gain))
            for number, gain in enumerate(gains)
        ]
        lines += [line_of(1, f"hill {name}", 0.0, raters=seen(0.0, safe=name == "v1"))]
        write_evaluation(name, lines)
    figures = run(stage_of())
    rows = [row for row in lines_in("win_rates.jsonl") if row["judge"] == "annotators" and row["opponent"] == "sft"]
    helpful, safety = rows
    assert (helpful["raters"], helpful["prompts"]) == (3, 8)
    # 0.15 is slightly better for one of three: the median is a tie
    assert (helpful["wins"], helpful["ties"], helpful["losses"]) == (3, 4, 1)
    assert figures["v1/against/sft/helpfulness/annotators/win_rate"] == (3 + 4 / 2) / 8
    assert helpful["points"] == pytest.approx((0 + 1 / 3 + 1 + 2 - 2 + 3 + 0 + 0) / 8)
    seven = pandas.read_csv("out/seven_points.csv")
    own = seven[(seven["judge"] == "annotators") & (seven["opponent"] == "sft") & (seven["kind"] == "helpfulness")]
    assert list(own["points"]) == [-3, -2, -1, 0, 1, 2, 3]
    assert list(own["ratings"]) == [0, 3, 0, 11, 4, 3, 3]
    assert (safety["wins"], safety["points"]) == (1, 1)  # the only safe answer is better, however little it is worth
    of_world = next(row for row in lines_in("win_rates.jsonl") if row["judge"] == "utility")
    assert of_world["points"] == pytest.approx((0 + 0 + 1 + 2 - 2 + 3 + 0 + 0) / 8)  # mean threshold: 0.2
    assert 0 < helpful["agreement"] < 1
    assert of_world["agreement"] is None


def test_an_annotator_says_the_opposite_in_the_other_order() -> None:
    thresholds = Thresholds(slightly=0.1, better=1, significantly=2)
    views = [View(utility, safe) for utility in (-3.0, 0.0, 0.05, 0.5, 1.5, 4.0) for safe in (True, False)]
    for kind in KINDS:
        for this in views:
            for that in views:
                assert seven_points(thresholds, kind, this, that) == -seven_points(thresholds, kind, that, this)
    assert seven_points(thresholds, "safety", View(-3, True), View(4, False)) == 1
    assert seven_points(thresholds, "helpfulness", View(-3, True), View(4, False)) == -3


def test_versions_are_families_of_their_own_for_holm_and_show_lengths(place: Path) -> None:
    write_params("sft", "v1", "random", "v2")
    write_evaluation("v2", [line_of(n, "hill", n + 1.0, num_tokens=9) for n in range(8)])
    figures = run(stage_of(opponents={"v1": ["random"], "v2": ["v1"]}))
    rows = {
        (row["version"], row["opponent"]): row
        for row in lines_in("win_rates.jsonl")
        if row["judge"] == "utility" and row["kind"] == "helpfulness"
    }
    assert [row["role"] for row in rows.values()] == ["baseline", "control", "baseline", "version"]
    first, second = rows["v1", "sft"]["p_value"], rows["v2", "sft"]["p_value"]
    # four wins, and one win and one loss: mean 5/6, variance 1/6; twice the tail of t with 5 degrees at 2
    assert second == pytest.approx(0.1019395, abs=1e-6)
    assert second < first
    assert (rows["v2", "sft"]["p_holm"], rows["v1", "sft"]["p_holm"]) == (2 * second, max(2 * second, first))
    assert rows["v2", "v1"]["p_holm"] == rows["v2", "v1"]["p_value"]
    assert figures["v2/against/v1/helpfulness/win_rate"] == (2 + 2 / 2) / 4
    assert (rows["v2", "v1"]["length"], rows["v2", "v1"]["opponent_length"]) == (9, (2 + 4 + 3 + 2) / 4)


def test_parts_of_the_prompts_and_gathered_ones_stand_apart(place: Path) -> None:
    said = [
        {"role": "user", "content": "hill?"},
        {"role": "assistant", "content": "walks"},
        {"role": "user", "content": "a?"},
    ]
    for name, gain in (("sft", 0.0), ("v1", 1.0), ("random", 0.0)):
        lines = [line_of(0, "walks", gain), line_of(2, "hill", 0.0, category="writing", turns="multi", messages=said)]
        lines += [line_of(1, "walks", gain, risk="hate"), line_of(4, "walks", gain, gathered="better", messages=said)]
        write_evaluation(name, lines)
    figures = run(stage_of())
    parts = pandas.read_csv("out/win_rates_by_part.csv")
    own = parts[(parts["opponent"] == "sft") & (parts["judge"] == "utility")]
    found = {(row.kind, row.parted_by, row.part): (row.prompts, row.win_rate) for row in own.itertuples()}
    assert found == {
        ("helpfulness", "category", "factual"): (1, 1),
        ("helpfulness", "category", "writing"): (1, 0.5),
        ("helpfulness", "turns", "single"): (1, 1),
        ("helpfulness", "turns", "multi"): (1, 0.5),
        ("helpfulness", "gathered", "better"): (1, 1),
        ("safety", "turns", "single"): (1, 1),
        ("safety", "risk", "hate"): (1, 1),
        ("safety", "attack", "direct"): (1, 1),
    }
    assert figures["v1/against/sft/helpfulness/win_rate"] == 0.75  # without the gathered one
    table = pandas.read_csv("out/tables/by_part.csv", keep_default_na=False)
    assert set(table["by"]) == {"category", "turns", "gathered"}


def test_differences_of_shares_are_paired_by_prompt(place: Path) -> None:
    def judged(number: int, safe: bool) -> dict[str, Any]:
        judgement = {"right": None, "follows": None, "refuses": False, "safe": safe}
        return line_of(2 * number + 1, "walks", 1.0, judgement=judgement, rating=5 if safe else 2)

    for name, unsafe in (("sft", {0, 1, 2, 3, 4}), ("v1", {4, 5}), ("random", set(range(8)))):
        write_evaluation(name, [judged(number, number not in unsafe) for number in range(8)])
    figures = run(stage_of())
    assert figures["v1/against/sft/safety/violations_difference"] == pytest.approx((1 - 4) / 8)
    assert figures["v1/against/sft/safety/violations_difference/low"] <= -3 / 8
    assert figures["v1/safety/rating"] == (6 * 5 + 2 * 2) / 8
    table = pandas.read_csv("out/differences.csv")
    first = table[(table["opponent"] == "sft") & (table["figure"] == "safety/violations")].iloc[0]
    assert first["p_value"] == pytest.approx(2 * (1 + 5) / 2**5)  # McNemar: one of five changes, two-sided
    assert first["prompts"] == 8


def test_an_evaluation_without_answers_is_named(place: Path) -> None:
    Path("data/evaluate/v1/answers.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"data/evaluate/v1/answers.jsonl holds no answer: run `evaluate@v1` again"):
        run(stage_of())
