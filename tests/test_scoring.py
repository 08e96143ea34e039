from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pandas
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import binomtest

from tasks.judging.intervals import mean_interval, wilson
from tasks.judging.scores import (
    accuracy_of,
    expected_calibration_error,
    length_figures,
    metric_path,
    reliability,
    report_scores,
    safety_figures,
    score_histogram,
    scored_pair,
)
from tasks.running.names import metric_name
from tasks.running.params import Machine, Section
from tasks.running.stage import Stage


class Params(Section):
    num_bins: int


def row(number: int, chosen: float, rejected: float, **values: Any) -> dict[str, Any]:
    return {
        "id": f"p{number}", "kind": "helpfulness", "degree": "better", "chosen_safe": None, "rejected_safe": None,
        "category": "factual", "responders": None, "annotator": "one", "source": "world", "round": "v1",
        "chosen_score": chosen, "rejected_score": rejected, **lengths(10, 10), **values,
    }  # fmt: skip


def lengths(chosen: int, rejected: int) -> dict[str, int]:
    return {"num_tokens_chosen": chosen, "num_tokens_rejected": rejected}


def safety(chosen: bool | None, rejected: bool | None) -> dict[str, Any]:
    return {"kind": "safety", "chosen_safe": chosen, "rejected_safe": rejected}


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage[Params]:
    monkeypatch.chdir(tmp_path)
    machine = Machine(threads=1, workers=1, scheduler=None, num_ranks=1, hostfile=None, num_seats=1)
    made = Stage("reward_safety@v1", Params(num_bins=4), 1, machine, Path("out"), Path("scratch"), Path("record"))
    for directory in (made.output, made.scratch, made.record):
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
    return made


def test_a_scored_pair_keeps_all_but_its_texts() -> None:
    pair = {"id": "a", "messages": [], "chosen": "yes", "rejected": "no", "degree": None, "kind": "safety"}
    assert scored_pair(pair, (0.5, -1.0), (3, 2)) == {
        "id": "a", "degree": None, "kind": "safety", "chosen_score": 0.5, "rejected_score": -1.0,
        "num_tokens_chosen": 3, "num_tokens_rejected": 2,
    }  # fmt: skip


# --- accuracy ---


def test_a_tie_counts_half() -> None:
    table = pandas.DataFrame([row(1, 1, 0), row(2, 0, 1), row(3, 2, 2), row(4, 3, 1)])
    found = accuracy_of(table)
    assert (found.pairs, found.accuracy) == (4, 2.5 / 4)
    assert found.low < 0.625 < found.high


def test_wilsons_interval_of_eight_in_ten() -> None:
    # z = 1.96: (0.8 + 3.8416 / 20 +- 1.96 sqrt(0.16 / 10 + 3.8416 / 400)) / (1 + 3.8416 / 10)
    low, high = wilson(8, 10)
    assert low == pytest.approx((0.8 + 0.19208 - 1.96 * math.sqrt(0.025604)) / 1.38416, abs=1e-5)
    assert high == pytest.approx((0.8 + 0.19208 + 1.96 * math.sqrt(0.025604)) / 1.38416, abs=1e-5)


@given(st.integers(1, 500).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_wilsons_interval_is_scipys_where_no_hit_is_a_half(drawn: tuple[int, int]) -> None:
    hits, count = drawn
    interval = binomtest(hits, count).proportion_ci(0.95, method="wilson")
    assert wilson(hits, count) == pytest.approx((interval.low, interval.high), abs=1e-9)


@given(st.integers(1, 2000).flatmap(lambda count: st.tuples(st.integers(0, 2 * count), st.just(count))))
@example((2 * 3, 3))
def test_wilsons_interval_holds_the_share(drawn: tuple[int, int]) -> None:
    halves, count = drawn
    low, high = wilson(halves / 2, count)
    assert 0 <= low <= halves / 2 / count <= high <= 1


def test_students_interval_of_a_mean() -> None:
    # deviation 0.1, of the mean 0.1 / sqrt(3); Student's 97.5% point of two degrees of freedom is 4.30265
    reach = 0.430265 / math.sqrt(3)
    assert mean_interval([0.5, 0.6, 0.4]) == pytest.approx((0.5 - reach, 0.5 + reach))
    assert mean_interval([0.7, 0.7]) == pytest.approx((0.7, 0.7))


# --- calibration ---


def test_the_reliability_curve_of_three_pairs() -> None:
    # sigmoid(ln 3) = 3/4, of -ln 3 = 1/4: two right pairs and a wrong one. In both orders that is at 3/4 the
    # preferences 1, 1, 0 and at 1/4 their opposites 0, 0, 1, each a half.
    margin = math.log(3)
    table = pandas.DataFrame([row(1, margin, 0), row(2, margin + 1, 1), row(3, 0, margin)])
    curve = reliability(table, 5)
    assert curve["predicted"].tolist() == pytest.approx([1 / 4, 3 / 4])
    assert curve["observed"].tolist() == pytest.approx([1 / 3, 2 / 3])
    assert curve["pairs"].tolist() == [1.5, 1.5]
    assert expected_calibration_error(curve) == pytest.approx(1 / 12)


def test_a_certain_prediction_and_a_tie_have_bins() -> None:
    table = pandas.DataFrame([row(1, 1000, 0), row(2, 1, 1)])
    curve = reliability(table, 2)
    # 0 -> the lower bin; 1, and the tie at 1/2 in both orders -> the upper
    assert curve["predicted"].tolist() == pytest.approx([0, (1 + 0.5 + 0.5) / 3])
    assert curve["observed"].tolist() == pytest.approx([0, (1 + 1 + 0) / 3])
    assert expected_calibration_error(curve) == 0


@given(st.lists(st.floats(-30, 30), min_size=1), st.integers(2, 12))
def test_a_calibration_error_is_a_share(margins: list[float], num_bins: int) -> None:
    curve = reliability(pandas.DataFrame([row(n, margin, 0) for n, margin in enumerate(margins)]), num_bins)
    assert 0 <= expected_calibration_error(curve) <= 1
    assert curve["pairs"].sum() == pytest.approx(len(margins))


# --- length ---


def test_length_figures_worked_by_hand() -> None:
    table = pandas.DataFrame(
        [
            row(1, 3, 1, **lengths(30, 10)),  # the longer is chosen, and right
            row(2, 4, 2, **lengths(40, 20)),  # the longer is chosen, and right
            row(3, 5, 6, **lengths(50, 60)),  # the shorter is chosen, and wrong
            row(4, 8, 7, **lengths(80, 70)),  # the longer is chosen, and right
            row(5, 0, 0, **lengths(5, 5)),
        ]
    )
    figures = length_figures(table)
    assert figures["length/spearman"] == pytest.approx(1)  # both rise together
    assert figures["length/baseline_accuracy"] == (3 + 0.5) / 5
    assert figures["length/balanced_accuracy"] == (1 + 0) / 2


def test_spearmans_correlation_of_four_answers() -> None:
    # ranks of scores 1 3 | 2 4, of lengths 1 2 | 3 4: 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    table = pandas.DataFrame([row(1, 0.1, 0.2, **lengths(7, 9)), row(2, 0.3, 0.4, **lengths(8, 10))])
    assert length_figures(table)["length/spearman"] == pytest.approx(1 - 6 * 2 / 60)


def test_a_rule_of_length_gets_half_of_the_balanced_pairs() -> None:
    pairs = [(3, 1), (9, 2), (8, 7), (4, 6)]
    table = pandas.DataFrame([row(n, a, b, **lengths(a, b)) for n, (a, b) in enumerate(pairs)])
    figures = length_figures(table)
    assert figures["length/balanced_accuracy"] == 0.5
    assert figures["length/baseline_accuracy"] == 0.75


def test_what_lengths_do_not_define_is_left_out() -> None:
    assert length_figures(pandas.DataFrame([row(1, 1, 0)])) == {"length/baseline_accuracy": 0.5}


# --- safe and unsafe answers ---


def test_safe_answers_against_unsafe_ones() -> None:
    table = pandas.DataFrame(
        [row(1, 3, 1, **safety(True, False)), row(2, 2, 0, **safety(False, None)), row(3, 2, 9, **safety(True, None))]
    )
    # safe 3, 2; unsafe 1, 2: three of four comparisons won, one tied
    assert safety_figures(table) == {"safe/mean_score": 2.5, "unsafe/mean_score": 1.5, "safe/auc": 3.5 / 4}
    histogram = score_histogram(table, 2)
    assert histogram["answers"].tolist() == ["safe", "safe", "unsafe", "unsafe"]
    assert histogram["score"].tolist() == [1.5, 2.5, 1.5, 2.5]
    assert histogram["share"].tolist() == [0, 1, 0.5, 0.5]


# --- the report ---


def test_the_report_names_figures_by_kind_degree_source_and_round(stage: Stage[Params]) -> None:
    rows = [
        row(1, 2, 0, degree="significantly", **lengths(20, 10)),
        row(2, 1, 0, **lengths(30, 10)),
        row(3, 0, 1, round="v2"),
        row(4, 1, 0, degree=None, source="anthropic hh", round=None),
        row(5, 1, 0, **safety(True, False)),
    ]
    figures = report_scores(stage, rows)
    assert figures["pairs"] == 5
    assert figures["accuracy"] == 4 / 5
    assert figures["helpfulness/accuracy"] == 3 / 4
    assert figures["safety/accuracy"] == 1
    assert figures["helpfulness/significantly/accuracy"] == 1
    assert figures["helpfulness/better/accuracy"] == 1 / 2
    assert figures["source/world/accuracy"] == 3 / 4
    assert figures["helpfulness/source/anthropic hh/accuracy"] == 1
    assert figures["helpfulness/source/world/length/baseline_accuracy"] == (1 + 1 + 0.5) / 3
    assert figures["helpfulness/source/anthropic hh/length/baseline_accuracy"] == 0.5
    assert figures["helpfulness/round/v1/accuracy"] == 1
    assert figures["round/v2/accuracy"] == 0
    assert (figures["accuracy/low"], figures["accuracy/high"]) == wilson(4, 5)
    assert figures["safety/safe/auc"] == 1
    assert not any("slightly" in name or "None" in name for name in figures)
    assert all(math.isfinite(value) for value in figures.values())


def test_the_plots_hold_the_figures_and_come_out_the_same_twice(stage: Stage[Params]) -> None:
    rows = [row(n, n % 3, n % 2, round=f"v{1 + n % 10}", **lengths(n, 5)) for n in range(30)]
    rows += [row(30 + n, n % 3, n % 2, **safety(n % 2 == 0, n % 3 == 0)) for n in range(9)]
    figures = report_scores(stage, rows)
    plots = stage.output / "plots"
    accuracy = pandas.read_csv(plots / "accuracy.csv").set_index("part")
    for part, place in (("all", "accuracy"), ("safety", "safety/accuracy"), ("round/v2", "round/v2/accuracy")):
        assert accuracy.loc[part, "accuracy"] == figures[place]
    names = [name for name in accuracy.index if name.startswith("round/")]
    assert names == [f"round/v{number}" for number in range(1, 11)]
    curve = pandas.read_csv(plots / "calibration.csv")
    assert expected_calibration_error(curve[curve["data"] == "safety"]) == pytest.approx(figures["safety/ece"])
    names = {f"{name}.{form}" for name in ("accuracy", "calibration", "length", "scores") for form in ("csv", "json")}
    assert {path.name for path in plots.iterdir()} == names
    pictures = {path.name for path in stage.artifacts.glob("*.png")}
    assert pictures == {"accuracy_by_degree.png", "accuracy_by_round.png", "reliability.png", "scores.png"}
    before = {path.name: path.read_bytes() for path in plots.iterdir()}
    shutil.rmtree(plots)
    report_scores(stage, rows)
    assert {path.name: path.read_bytes() for path in plots.iterdir()} == before


def test_open_source_pairs_alone_are_reported(stage: Stage[Params]) -> None:
    figures = report_scores(stage, [row(1, 1, 0, degree=None, round=None), row(2, 0, 1, degree=None, round=None)])
    assert figures["accuracy"] == 0.5
    assert not (stage.output / "plots" / "scores.csv").exists()


def test_sources_have_whatever_names(stage: Stage[Params]) -> None:
    names = ["HH-RLHF (red team)", "HH-RLHF [red team]", "all", "a//b"]
    figures = report_scores(stage, [row(n, n, 0, source=name) for n, name in enumerate(names)])
    assert {metric_name("helpfulness", "source", name, "accuracy") for name in names} < set(figures)
    assert metric_path("/better", "accuracy") == "better/accuracy"


def test_no_pairs_are_refused(stage: Stage[Params]) -> None:
    with pytest.raises(ValueError, match=r"there is no held-out pair to score: the preferences' validation.jsonl"):
        report_scores(stage, [])


def test_a_score_that_is_no_number_is_refused(stage: Stage[Params]) -> None:
    with pytest.raises(ValueError, match="the answers of pair p2 score nan and 1: the reward model is broken"):
        report_scores(stage, [row(1, 1, 0), row(2, math.nan, 1)])
