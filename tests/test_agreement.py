import math
import random

import numpy as np
import pytest

from tasks.judging.agreement import STEPS, Agreement, gwet, ordinal_weights, report_agreement, step_of
from tasks.reading.prompts import Label

# Twelve units, up to four raters, five categories: the worked example of Gwet's handbook, without its last unit, which
# has one rating. Figures: irrcac 0.4.4.
HANDBOOK = [
    [0, 0, 0],
    [1, 1, 2, 1],
    [2, 2, 2, 2],
    [2, 2, 2, 2],
    [1, 1, 1, 1],
    [0, 1, 2, 3],
    [3, 3, 3, 3],
    [0, 0, 1, 0],
    [1, 1, 1, 1],
    [4, 4, 4],
    [0, 0],
]
AC1 = Agreement(0.7751517, 0.4960285, 1)
AC2 = Agreement(0.8977084, 0.734514, 1)


def test_a_table_worked_by_hand():
    # Agreeing pairs of raters: 1, 1/3, 1, 1/3, so 2/3. Both categories are as frequent, so chance agreement is 1/2, and
    # AC1 = (2/3 - 1/2) / (1 - 1/2) = 1/3. Parts 1, -1/3, 1, -1/3 each lie 2/3 from it: error = sqrt(16/9 / 12).
    found = gwet([[0, 0, 0], [0, 0, 1], [1, 1, 1], [0, 1, 1]], 2, ordinal=False)
    assert found.coefficient == pytest.approx(1 / 3)
    assert found.low == pytest.approx(1 / 3 - 3.182446305284263 * math.sqrt(16 / 108))
    assert found.high == 1


def test_ordinal_weights_worked_by_hand():
    # Between categories 1 and 2 lies one pair, between 1 and 3 three, between 1 and 4 six.
    expected = [[1, 5 / 6, 1 / 2, 0], [5 / 6, 1, 5 / 6, 1 / 2], [1 / 2, 5 / 6, 1, 5 / 6], [0, 1 / 2, 5 / 6, 1]]
    assert np.allclose(ordinal_weights(4), expected)


def test_the_example_of_the_handbook():
    assert gwet(HANDBOOK, 5, ordinal=False) == pytest.approx(AC1, abs=1e-6)
    assert gwet(HANDBOOK, 5, ordinal=True) == pytest.approx(AC2, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_equal_to_irrcac(seed):
    cac = pytest.importorskip("irrCAC.raw", reason="its pins exclude ours: pip install --no-deps irrcac").CAC
    import pandas

    rng = random.Random(seed)
    truth = [rng.randrange(STEPS) for _ in range(40)]
    ratings = [[rng.choice([value, value, rng.randrange(STEPS)]) for _ in range(rng.randint(2, 4))] for value in truth]
    frame = pandas.DataFrame(ratings, dtype=float)
    for weights in ("identity", "ordinal"):
        expected = cac(frame.copy(), weights=weights, categories=list(range(STEPS)), digits=9).gwet()["est"]
        found = gwet(ratings, STEPS, ordinal=weights == "ordinal")
        assert found.coefficient == pytest.approx(expected["coefficient_value"], abs=1e-6)
        assert (found.low, found.high) == pytest.approx(expected["confidence_interval"], abs=1e-6)


def test_choice_and_degree_make_one_scale():
    steps = [step_of(Label(0, degree, None, "a")) for degree in ("significantly", "better", "slightly", "negligibly")]
    steps += [step_of(Label(1, degree, None, "a")) for degree in ("negligibly", "slightly", "better", "significantly")]
    assert steps == list(range(8))


def test_all_the_same_is_full_agreement_and_coins_are_none():
    assert gwet([[1, 1], [1, 1], [1, 1]], 2, ordinal=False) == Agreement(1, 1, 1)
    rng = random.Random(0)
    coins = gwet([[rng.randrange(2) for _ in range(3)] for _ in range(2000)], 2, ordinal=False)
    assert coins.low < 0 < coins.high
    assert coins.high - coins.low < 0.1


def test_the_report_leaves_out_pairs_with_one_label():
    def pair(*labels):
        return [Label(choice, degree, safe, "a") for choice, degree, safe in labels]

    agreed = pair((0, "better", (True, False)), (0, "better", (True, False)))
    alone = pair((1, "better", (True, True)))
    assert report_agreement([agreed, alone]) == {"agreement/pairs": 1}
    figures = report_agreement([agreed, alone, pair((1, "slightly", (True, True)), (0, "slightly", (True, True)))])
    assert figures["agreement/pairs"] == 2
    assert figures["agreement/safety/ac1"] == 1
    # One pair of two agrees; choices 3/4 and 1/4: chance 2 * 3/4 * 1/4 = 3/8, AC1 = (1/2 - 3/8) / (5/8) = 1/5.
    assert figures["agreement/choice/ac1"] == pytest.approx(1 / 5)
    assert figures["agreement/degree/ac2"] > figures["agreement/choice/ac1"]  # slightly left and right are near
    unlabelled = [[label._replace(safe=None) for label in own] for own in (agreed, agreed)]
    assert "agreement/safety/ac1" not in report_agreement(unlabelled)
