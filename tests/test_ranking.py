from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.judging.calibration import Line
from tasks.judging.ranking import Reward, Scales, chances_of_middle, chances_of_place, ranked, reward_of

# helpfulness: twice the score less 1; safety: the score itself, safe from 0 on
SCALES = Scales(Line(2.0, -1.0), Line(1.0, 0.0), threshold=0.5)


def test_the_combination_by_hand() -> None:
    assert reward_of("helpfulness", 3.0, 0.5, -1.0, SCALES, weight=0.0) == ("helpfulness", 5.0)
    assert reward_of("helpfulness", 3.0, -0.5, -1.0, SCALES, weight=0.0) == ("safety", -0.5)  # called unsafe
    assert reward_of("safety", 3.0, 0.5, -1.0, SCALES, weight=0.0) == ("safety", 0.5)  # the prompt is tagged
    assert reward_of("helpfulness", 3.0, 0.0, -1.0, SCALES, weight=0.0).branch == "helpfulness"  # not below
    assert reward_of("helpfulness", 3.0, 0.5, -0.25, SCALES, weight=4.0) == ("helpfulness", 4.0)
    assert reward_of("safety", 3.0, 0.5, -0.25, SCALES, weight=2.0) == ("safety", 0.0)


def test_ranks_by_hand() -> None:
    rewards = [
        Reward("safety", 9.0),
        Reward("helpfulness", -3.0),
        Reward("helpfulness", 2.0),
        Reward("safety", 10.0),
        Reward("helpfulness", 2.0),
        Reward("helpfulness", 50.0),
    ]
    # the last was cut; answers called unsafe follow all others, whatever they score; of two alike the first leads
    assert ranked(rewards, [True] * 5 + [False]) == [2, 4, 1, 3, 0, 5]
    assert ranked(rewards, [False] * 6) == [5, 2, 4, 1, 3, 0]
    assert ranked([], []) == []


KINDS = st.sampled_from(["helpfulness", "safety"])
SCORES = st.tuples(st.floats(-9, 9), st.floats(-9, 9), st.floats(-9, 0), st.booleans())


@given(KINDS, st.lists(SCORES, max_size=8), st.floats(0, 5), st.floats(0.1, 9), st.floats(-9, 9))
def test_numbers_of_two_models_are_never_compared(
    kind: str, drawn: list[tuple[float, float, float, bool]], weight: float, slope: float, intercept: float
) -> None:
    """Another zero and unit of one model's log-odds changes the order of nothing, if the branches are the same."""
    rewards = [reward_of(kind, h, s, p, SCALES, weight) for h, s, p, _ in drawn]  # type: ignore[arg-type]
    eligible = [each for *_, each in drawn]
    order = ranked(rewards, eligible)
    assert sorted(order) == list(range(len(drawn)))
    moved = [
        Reward(each.branch, each.value * slope + intercept) if each.branch == "safety" else each for each in rewards
    ]
    if len(set(moved)) == len(set(rewards)):  # rounding makes no two alike
        assert ranked(moved, eligible) == order
    for before, after in pairwise(order):
        assert eligible[before] >= eligible[after]
        if eligible[before] == eligible[after]:
            branches = (rewards[before].branch, rewards[after].branch)
            assert branches != ("safety", "helpfulness")
            if branches[0] == branches[1]:
                assert (-rewards[before].value, before) < (-rewards[after].value, after)


def test_the_best_of_two_among_three() -> None:
    # pairs of 1st and 2nd, 1st and 3rd, 2nd and 3rd: the best is the 1st twice and the 2nd once
    assert chances_of_place(3, 2, 0).tolist() == pytest.approx([2 / 3, 1 / 3, 0])
    assert chances_of_place(3, 2, 1).tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    assert chances_of_middle(3, 2).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert chances_of_middle(3, 3).tolist() == [0, 1, 0]
    assert chances_of_place(4, 1, 0).tolist() == [0.25] * 4


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=7), st.data())
def test_chances_are_those_of_all_ways_to_draw(values: list[float], data: st.DataObject) -> None:
    values = sorted(values, reverse=True)
    num_drawn = data.draw(st.integers(1, len(values)))
    ways = list(combinations(values, num_drawn))
    assert chances_of_place(len(values), num_drawn, 0) @ values == pytest.approx(np.mean([way[0] for way in ways]))
    assert chances_of_middle(len(values), num_drawn) @ values == pytest.approx(np.mean([np.median(w) for w in ways]))
