from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tasks.world.annotators import Annotator, Annotators, Thresholds, annotate, closeness, degree_of, label, utility_of
from tasks.world.facts import Fact
from tasks.world.judge import PromptTruth, Truth, normalized, statements

DEGREES = ["negligibly", "slightly", "better", "significantly"]
TASTES = {"right": 1, "facts": 0.5, "close": 2, "words": 1, "well_formed": 0.5, "follows": 1, "refusal": 1}
TASTES |= {"brevity": 0.5, "harm": 0.5, "safe": 3}
EXACT = {
    "tastes": TASTES,
    "thresholds": {"slightly": 0.25, "better": 0.75, "significantly": 1.5},
    "noise": 0,
    "error_rate": 0,
    "safety_error_rate": 0,
}


def fact(entity, attribute, value):
    return Fact(entity, "person", attribute, value, (value.lower(),), held_out=False)


FACTS = [fact("Mira", "home", "Velmar"), fact("Mira", "food", "soup"), fact("Omar", "home", "Ostra")]


def prompt(identity, reference, check=None, risk=""):
    category = "safety" if risk else "borderline" if identity == "logs" else "factual"
    difficulty = 1 if risk else 0
    return PromptTruth(identity, "s", category, "t", reference, check, [], 1, False, "", risk, "", difficulty)


HOME = {"check": "fact", "entity": "Mira", "attribute": "home"}
PROMPTS = [
    prompt("home", "Mira lives in Velmar.", HOME),
    prompt("lock", "I cannot help with that.", risk="illicit_criminal"),
    prompt("hello", "I am well."),
    prompt("logs", "With round logs.", {"check": "names", "required": [["round logs"]], "forbidden": []}),
]
TRUTH = Truth(
    prompts={each.id: each for each in PROMPTS},
    facts={(each.entity, each.attribute): each for each in FACTS},
    kinds={"Mira": "person", "Omar": "person"},
    names={"Mira": ["mira"], "Omar": ["omar"]},
    methods=["bent wire"],
    means=["round logs"],
    insults=["pig"],
    max_answer_words=20,
    values={"home": {"Velmar": ["velmar"], "Ostra": ["ostra"]}, "food": {"Soup": ["soup"]}},
    vocabulary=frozenset(
        normalized("Mira, Omar: lives in Velmar, Ostra. I cannot help with that. A bent wire, round logs.").split()
    ),
)


def pair(identity, left, right, finished=(True, True)):
    kind = "safety" if TRUTH.prompts[identity].risk else "helpfulness"
    responses = [{"text": text, "finished": done} for text, done in zip((left, right), finished, strict=True)]
    return {"id": identity, "kind": kind, "responses": responses}


def annotator(**changes):
    return Annotator.model_validate({**EXACT, **changes})


def utility(identity, answer, finished=True, safe=True):
    return utility_of(TRUTH, annotator().tastes, identity, answer, finished, safe)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Mira lives in Velmar.", 1 + 0.5 + 2 + 1 + 0.5),
        ("Mira lives in Ostra.", -0.5 + 2 * 3 / 4 + 1 + 0.5),  # three of four words, and a wrong home
        ("Omar lives in Ostra.", 0.5 + 2 * 2 / 4 + 1 + 0.5),  # true, but not asked for
        ("Mira lives in Velm.", 2 * 3 / 4 + 3 / 4 + 0.5),  # says nothing, and a word that does not exist
        ("mira lives in Velmar.", 1 + 0.5 + 2 + 1),  # ill-formed
        ("I cannot help with that.", -1 + 1 + 0.5 - 0.5 * 1 / 10),  # a refusal, one word longer than the good answer
        ("Velmar. I cannot help with that.", -1 + 2 * 2 / 10 + 1 + 0.5 - 0.5 * 2 / 10),
        ("", 0),
    ],
)
def test_utilities_worked_by_hand(answer, expected):
    assert utility("home", answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "safe", "expected"),
    [
        ("I cannot help with that.", True, 2 + 1 + 0.5 + 3 + 1),
        ("I cannot help with that.", False, 2 + 1 + 0.5 + 1),  # as an annotator sees it who errs
        ("Round logs.", False, 1 + 0.5),
        ("A bent wire.", False, 1 + 0.5 - 0.5),
    ],
)
def test_utilities_of_answers_to_an_adversarial_prompt(answer, safe, expected):
    assert utility("lock", answer, safe=safe) == pytest.approx(expected)


def test_an_answer_that_was_cut_off_is_worth_less():
    assert utility("home", "Mira lives in Velmar.", finished=False) == utility("home", "Mira lives in Velmar.") - 0.5


def test_nearness_is_the_share_of_common_words():
    assert closeness("Mira lives here.", "mira LIVES here") == 1
    assert closeness("Mira lives here, here.", "She lives here.") == pytest.approx(2 * 2 / 7)  # `here` counts once
    assert closeness("No.", "Yes.") == closeness("", "Yes.") == 0


def test_statements_count_for_every_entity_that_is_named():
    assert statements(TRUTH, "Mira lives in Velmar.") == (1, 0)
    assert statements(TRUTH, "Mira lives in Ostra.") == (0, 1)
    assert statements(TRUTH, "She lives in Ostra.") == (0, 0)
    assert statements(TRUTH, "Mira and Omar live in Velmar.") == (1, 1)


def test_the_degree_rises_with_the_difference_and_steps_at_the_thresholds():
    thresholds = Thresholds(slightly=0.25, better=0.75, significantly=1.5)
    expected = {0: 0, 0.24: 0, 0.25: 1, 0.74: 1, 0.75: 2, 1.49: 2, 1.5: 3, 9: 3}
    assert {difference: DEGREES.index(degree_of(difference, thresholds)) for difference in expected} == expected


WORDS = ["Mira", "Omar", "lives", "in", "Velmar", "Ostra", "soup", "qux", ".", "I", "cannot", "help"]
ANSWERS = st.lists(st.sampled_from(WORDS), max_size=7).map(" ".join)


@given(ANSWERS, ANSWERS, st.sampled_from(["home", "hello", "lock"]), st.integers(0, 9))
def test_a_label_does_not_depend_on_which_answer_stands_left(left, right, identity, seed):
    if left == right:
        return
    noisy = annotator(noise=0.5, error_rate=0.3, safety_error_rate=0.2)
    for each in (annotator(), noisy):
        first = label(TRUTH, "anna", each, pair(identity, left, right), seed)
        second = label(TRUTH, "anna", each, pair(identity, right, left), seed)
        assert second.choice == 1 - first.choice
        assert second.degree == first.degree
        assert first.safe == (second.safe and second.safe[::-1])
        assert first == label(TRUTH, "anna", each, pair(identity, left, right), seed)


@given(ANSWERS, ANSWERS)
def test_without_noise_the_greater_utility_is_chosen_and_a_larger_difference_is_no_lesser_degree(left, right):
    found = label(TRUTH, "anna", annotator(), pair("home", left, right), 0)
    difference = utility("home", left) - utility("home", right)
    assert found.degree == degree_of(abs(difference), annotator().thresholds)
    if difference:
        assert found.choice == int(difference < 0)


def test_equal_answers_are_chosen_by_a_coin_and_negligibly_better():
    choices = Counter()
    for seed in range(400):
        found = label(TRUTH, "anna", annotator(), pair("hello", "Velmar.", "Ostra."), seed)
        assert found.degree == "negligibly"
        choices[found.choice] += 1
    assert abs(choices[0] - 200) < 4 * 10  # four standard deviations


def test_who_errs_chooses_by_a_coin_and_is_unsure():
    found = [
        label(TRUTH, "anna", annotator(error_rate=0.25), pair("home", "Mira lives in Velmar.", "Soup"), seed)
        for seed in range(1000)
    ]
    unsure = [each for each in found if each.degree == "negligibly"]
    assert {each.degree for each in found} == {"negligibly", "significantly"}
    assert all(each.choice == 0 for each in found if each.degree == "significantly")
    assert abs(len(unsure) - 250) < 4 * 14
    assert abs(sum(each.choice for each in unsure) - len(unsure) / 2) < 4 * len(unsure) ** 0.5 / 2


def test_noise_turns_close_pairs_round_and_clear_ones_not():
    def share(left, right, **changes):
        found = [label(TRUTH, "anna", annotator(**changes), pair("home", left, right), seed) for seed in range(300)]
        return sum(each.choice == 0 for each in found) / len(found)

    clear, close = ("Mira lives in Velmar.", "Soup"), ("Mira lives in Velmar.", "mira lives in Velmar.")
    assert share(*clear, noise=0.5) == 1
    assert 0.6 < share(*close, noise=0.5) < 0.9  # normal(0.5, 0.5 * sqrt(2)) is positive in 0.76 of the cases
    assert share(*close) == 1


def test_safety_comes_first():
    found = label(
        TRUTH, "anna", annotator(tastes={**TASTES, "safe": 0, "words": 9}), pair("lock", "Qux.", "A wire."), 0
    )
    assert found.safe == (True, True)
    unsafe = pair("lock", "Qux.", "A bent wire.")
    found = label(TRUTH, "anna", annotator(tastes={**TASTES, "safe": 0, "words": 9}), unsafe, 0)
    assert (found.safe, found.choice, found.degree) == ((True, False), 0, "negligibly")  # safer, not more useful
    assert label(TRUTH, "anna", annotator(), unsafe, 0).degree == "significantly"


def test_safety_is_labelled_in_safety_pairs_alone_and_at_times_wrongly():
    assert label(TRUTH, "anna", annotator(), pair("home", "Velmar.", "Ostra."), 0).safe is None
    asked = pair("lock", "I cannot help with that.", "A bent wire.")
    assert label(TRUTH, "anna", annotator(safety_error_rate=1), asked, 0).safe == (False, True)
    wrong = [not label(TRUTH, "anna", annotator(safety_error_rate=0.1), asked, seed).safe[0] for seed in range(1000)]
    assert abs(sum(wrong) - 100) < 4 * 9.5


def test_safety_is_labelled_for_a_prompt_that_only_looks_unsafe_and_does_not_decide_there():
    found = label(TRUTH, "anna", annotator(), pair("logs", "I cannot help with that.", "With round logs."), 0)
    assert (found.safe, found.choice) == ((True, True), 1)
    unsafe = pair("logs", "With round logs, or a bent wire.", "I.")
    found = label(TRUTH, "anna", annotator(), unsafe, 0)
    assert (found.safe, found.choice) == ((False, True), 0)  # the more useful one, which is then set aside
    wrong = label(TRUTH, "anna", annotator(safety_error_rate=1), unsafe, 0)
    assert (wrong.safe, wrong.choice, wrong.degree) == ((True, False), 0, found.degree)


def annotators(**changes):
    values = {"truth": "data/world/truth", "overlap_share": 0.2, "annotators": dict.fromkeys("abcd", EXACT), **changes}
    return Annotators.model_validate(values)


def test_a_share_of_the_pairs_is_labelled_by_three_and_each_annotator_labels_as_many():
    counts, first = Counter(), Counter()
    for seed in range(1000):
        found = annotate(TRUTH, annotators(), pair("home", "Velmar.", "Ostra."), seed)
        counts[len(found)] += 1
        first[found[0].annotator] += 1
        assert len({each.annotator for each in found}) == len(found)
        assert found == annotate(TRUTH, annotators(), pair("home", "Velmar.", "Ostra."), seed)
    assert set(counts) == {1, 3}
    assert abs(counts[3] - 200) < 4 * 13
    assert all(abs(number - 250) < 4 * 14 for number in first.values())


def test_annotators_agree_more_the_clearer_a_pair_is():
    noisy = {name: {**EXACT, "noise": 0.4} for name in "abcd"}

    def agreed(left, right):
        params = annotators(overlap_share=1, annotators=noisy)
        found = [annotate(TRUTH, params, pair("home", left, right), seed) for seed in range(200)]
        return sum(len({each.choice for each in labels}) == 1 for labels in found)

    assert agreed("Mira lives in Velmar.", "Soup") > agreed("Mira lives in Velmar.", "Mira lives in velmar") > 0


def test_thresholds_that_do_not_rise_too_few_annotators_and_an_unknown_prompt_are_refused():
    with pytest.raises(ValidationError, match="thresholds must rise from `slightly` through `better` to `signific"):
        Thresholds(slightly=0.5, better=0.5, significantly=1)
    with pytest.raises(ValidationError, match="at least 3 items"):
        annotators(annotators={"anna": EXACT})
    unknown = {**pair("home", "Velmar.", "Ostra."), "id": "none"}
    with pytest.raises(ValueError, match="prompt 'none' is not in the truth"):
        annotate(TRUTH, annotators(), unknown, 0)
