from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.judging.calibration import Line, choose_threshold, fit_helpfulness, fit_safety

# --- lines ---


def test_a_line_through_two_scores_by_hand() -> None:
    # score 1: 3 safe of 4; score -1: 1 of 4. Platt's targets: 5/6 for each of 4 safe, 1/6 for each of 4 unsafe ones,
    # so the mean target at 1 is (3 * 5/6 + 1/6) / 4 = 2/3, whose log-odds are ln 2; at -1 the opposite.
    scores = [1.0] * 4 + [-1.0] * 4
    safe = [True, True, True, False, False, False, False, True]
    line = fit_safety(scores, safe)
    assert line == pytest.approx((math.log(2), 0), abs=1e-5)
    assert line.probability(1) == pytest.approx(2 / 3)
    # scores in another unit, from another zero, mean the same
    moved = fit_safety([100 + 7 * score for score in scores], safe)
    assert [moved.log_odds(107), moved.log_odds(93)] == pytest.approx([math.log(2), -math.log(2)], abs=1e-5)


def test_labels_that_scores_separate_give_a_finite_slope() -> None:
    line = fit_safety([1.0, 2.0, -1.0, -2.0], [True, True, False, False])
    assert 0.5 < line.slope < 2
    assert 0.6 < line.probability(1) < line.probability(2) < 1
    assert Line(1e9, 0).probability(-1e9) == 0


def test_a_line_from_pairs_by_hand() -> None:
    # 2 pairs whose chosen answer leads by 2, and 1 in which it trails by 2. The targets are 4/5, so that one of the
    # differences of 2 is right (2 * 4/5 + 1/5) / 3 = 3/5 of the time: log-odds ln 1.5 for a lead of 2.
    line = fit_helpfulness([3.0, 4.0, 0.0], [1.0, 2.0, 2.0])
    assert line.slope == pytest.approx(math.log(1.5) / 2, abs=1e-6)
    assert line.log_odds(2.0) == pytest.approx(0)  # the mean of all six scores


@given(st.lists(st.tuples(st.floats(-50, 50), st.booleans()), min_size=2))
def test_the_mean_probability_is_the_mean_target(labels: list[tuple[float, bool]]) -> None:
    scores, safe = [score for score, _ in labels], [label for _, label in labels]
    num_safe, num_unsafe = sum(safe), len(safe) - sum(safe)
    try:
        line = fit_safety(scores, safe)
    except ValueError as error:
        assert not (num_safe and num_unsafe) or "can't tell them apart" in str(error)
        return
    expected = (num_safe * (num_safe + 1) / (num_safe + 2) + num_unsafe / (num_unsafe + 2)) / len(safe)
    assert np.mean([line.probability(score) for score in scores]) == pytest.approx(expected, abs=1e-3)


def test_labels_of_one_class_are_refused() -> None:
    message = r"of the 2 held-out answers with a label of safety, 2 are safe and 0 unsafe: both are needed"
    with pytest.raises(ValueError, match=message):
        fit_safety([1.0, 2.0], [True, True])
    with pytest.raises(ValueError, match=r"of the 0 held-out answers"):
        fit_safety([], [])
    with pytest.raises(ValueError, match=r"there is no held-out helpfulness pair to calibrate"):
        fit_helpfulness([], [])


def test_scores_that_contradict_the_labels_are_refused() -> None:
    for scores in ([2.0, 1.0], [1.0, 1.0]):
        with pytest.raises(ValueError, match=r"unsafe no lower than the 1 safe ones: it can't tell them apart"):
            fit_safety(scores, [False, True])
        with pytest.raises(ValueError, match=r"of the 1 held-out pairs no higher than the rejected ones"):
            fit_helpfulness([scores[1]], [scores[0]])


def test_scores_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the safety model scored a held-out answer nan: it is broken"):
        fit_safety([1.0, math.nan], [True, False])
    with pytest.raises(ValueError, match=r"the helpfulness model scored a held-out answer inf: it is broken"):
        fit_helpfulness([math.inf], [0.0])


# --- the threshold ---


def test_the_threshold_by_hand() -> None:
    # called unsafe below 0.4: two of two; below 0.6: two of three; below 0.8: three of four; below 1: three of five
    probabilities, safe = [0.8, 0.2, 0.6, 0.1, 0.4], [True, False, False, False, True]
    found = choose_threshold(probabilities, safe, 0.89)
    assert found == (0.4, 1.0, 2 / 3, 5, 3)
    assert choose_threshold(probabilities, safe, 0.75) == (0.8, 0.75, 1.0, 5, 3)
    assert choose_threshold(probabilities, safe, 0.6).threshold == 1


def test_answers_of_equal_probability_are_called_alike() -> None:
    alike = [0.1, 0.1, 0.1, 0.9], [False, True, False, True]
    assert choose_threshold(*alike, 0.6) == (0.9, 2 / 3, 1.0, 4, 2)
    # no threshold has the precision: nothing is called unsafe
    assert choose_threshold(*alike, 0.89) == (0.0, None, 0.0, 4, 2)


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.9]), st.booleans()), min_size=1), st.floats(0.05, 1))
def test_no_larger_threshold_has_the_precision(labels: list[tuple[float, bool]], precision: float) -> None:
    def precision_below(threshold: float) -> float:
        called = [not safe for probability, safe in labels if probability < threshold]
        return sum(called) / len(called) if called else 0.0

    larger = [0.0, 0.1, 0.25, 0.5, 0.9, 1.0]
    found = choose_threshold(*zip(*labels, strict=True), precision)
    if found.precision is None:
        assert found.threshold == found.recall == 0
        assert all(precision_below(threshold) < precision for threshold in larger)
        return
    assert found.precision == precision_below(found.threshold) >= precision
    assert all(precision_below(each) < precision for each in larger if each > found.threshold)
