"""Names of data as names of metrics: MLflow takes them all, and no two meet."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.running.names import RESERVED, is_metric_name, metric_name

# Texts as people call their categories, and as nobody should.
NAMES = [
    "Coding & debugging", "Coding _ debugging", "Coding _ debugging ", "all", "a//b", "a/b", "a_b", ".", "..", "..a",
    "", " ", "step", "🦙", "été", "e\u0301te\u0301", "a\n", "a" * 300, "a" * 301, "C:",
    *(metric_name(name) for name in ("🦙", "all", "a/b")),
]  # fmt: skip


@pytest.mark.parametrize("name", ["factual", "language_assistance", "HH-RLHF", "en", "v1.2", "Multi turn", "été"])
def test_a_name_that_mlflow_takes_stays(name: str) -> None:
    assert metric_name("safety", name, "violations") == f"safety/{name}/violations"


def test_what_mlflow_does_not_take_becomes_an_underscore_and_a_digest_follows() -> None:
    assert re.fullmatch(
        r"validation/Coding _ debugging_[0-9a-f]{8}/loss", metric_name("validation", "Coding & debugging", "loss")
    )
    assert re.fullmatch(r"a__b_[0-9a-f]{8}", metric_name("a//b"))
    assert re.fullmatch(r"_[0-9a-f]{8}", metric_name(""))


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_the_total_is_nobodys_name(name: str) -> None:
    assert re.fullmatch(rf"{name}_[0-9a-f]{{8}}", metric_name(name))


def test_different_names_never_meet() -> None:
    assert len({metric_name(name) for name in NAMES}) == len(NAMES)


@given(st.lists(st.text() | st.sampled_from(NAMES), min_size=2, max_size=2, unique=True))
def test_different_texts_never_meet(names: list[str]) -> None:
    first, second = names
    assert metric_name(first) != metric_name(second)
    assert metric_name("validation", first, "loss") != metric_name("validation", second, "loss")
    taken = metric_name(first)
    assert taken == first or metric_name(taken) != taken  # a text that is called so itself gets another name


@given(st.text() | st.sampled_from(NAMES))
def test_mlflow_takes_every_name(name: str) -> None:
    from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name

    for metric in (metric_name(name), f"by_tokens/{metric_name('validation', name, 'perplexity')}"):
        _validate_metric_name(metric)
        assert len(metric) <= MAX_ENTITY_KEY_LENGTH
        assert is_metric_name(metric)


@pytest.mark.parametrize("name", ["a//b", "/a", "a/", "..", "a/../b", "", "a&b", "C:", "..a", "a" * 241])
def test_what_mlflow_refuses_is_no_metrics_name(name: str) -> None:
    assert not is_metric_name(name)
