from itertools import chain, islice, repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.tokenize.mixture import draw, plan_targets, shuffled

SOURCES = st.dictionaries(
    st.sampled_from("abcdef"),
    st.tuples(st.floats(0.01, 100), st.integers(1, 10**9)),
    min_size=1,
)


def test_a_source_that_runs_short_gives_its_share_to_the_others_by_weight():
    # c has 10 of the 50 it should give; the 40 go to a and b at 3 to 2
    targets = plan_targets({"a": 3, "b": 2, "c": 5}, {"a": 1000, "b": 1000, "c": 10}, num_tokens=100)
    assert targets == {"c": 10, "a": 54, "b": 36}


def test_a_source_that_runs_short_because_of_anothers_share_is_capped_too():
    # of 100, a has 10 of 50; then b would have to give 60 of the other 90 and has 40; the last 50 are c's
    targets = plan_targets({"a": 3, "b": 2, "c": 1}, {"a": 10, "b": 40, "c": 1000}, num_tokens=100)
    assert targets == {"a": 10, "b": 40, "c": 50}


@given(SOURCES, st.integers(1, 10**9))
def test_targets_fill_the_stream_within_capacity_and_in_proportion(sources, num_tokens):
    weights = {name: weight for name, (weight, _) in sources.items()}
    capacities = {name: capacity for name, (_, capacity) in sources.items()}
    targets = plan_targets(weights, capacities, num_tokens)
    assert sum(targets.values()) == pytest.approx(min(num_tokens, sum(capacities.values())))
    levels = {name: targets[name] / weights[name] for name in targets}
    for name, target in targets.items():
        assert target <= capacities[name] * (1 + 1e-9)
        if target < capacities[name] * (1 - 1e-9):  # not short of text: its level is the highest, and common
            assert levels[name] == pytest.approx(max(levels.values()))


def test_each_epoch_is_a_new_order_of_all_documents():
    order = list(islice(shuffled(50, "web", seed=1), 150))
    epochs = [order[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert order == list(islice(shuffled(50, "web", seed=1), 150))
    assert order != list(islice(shuffled(50, "web", seed=2), 150))
    assert order != list(islice(shuffled(50, "books", seed=1), 150))


def test_documents_interleave_evenly():
    # a gives six documents of 10 tokens, b two of 15: b's stand where a quarter and three quarters are drawn
    drawn = draw([[10] * 6, [15] * 2], [60, 30], [60, 30], 90, [chain(range(6), [0]), chain(range(2), [0])])
    assert list(drawn) == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (0, 4), (1, 1), (0, 5)]


def test_the_stream_ends_before_the_document_that_does_not_fit():
    # middles: a 5/20 and 15/20, b 2.5/4.6; after a and b, a's second would make 25 tokens of 24
    drawn = draw([[10, 10], [5, 4]], [20, 4.6], [20, 9], 24, [chain(range(2), [0]), iter([0, 1])])
    assert list(drawn) == [(0, 0), (1, 0)]


LENGTHS = st.lists(st.lists(st.integers(2, 300), min_size=1, max_size=30), min_size=1, max_size=5)


@given(LENGTHS, st.data())
def test_at_any_point_every_source_has_given_its_part(lengths, data):
    epochs = [data.draw(st.floats(0.3, 3)) for _ in lengths]
    weights = {str(number): data.draw(st.floats(0.1, 10)) for number in range(len(lengths))}
    num_tokens = data.draw(st.integers(1, 20_000))
    capacities = [int(most * sum(own)) for most, own in zip(epochs, lengths, strict=True)]
    by_name = plan_targets(weights, dict(zip(weights, capacities, strict=True)), num_tokens)
    targets = [by_name[name] for name in weights]
    orders = [chain.from_iterable(repeat(range(len(own)))) for own in lengths]
    given_by, progress = [0] * len(lengths), [(0.0, [0] * len(lengths))]
    for source, document in draw(lengths, targets, capacities, num_tokens, orders):
        middle = (given_by[source] + lengths[source][document] / 2) / targets[source]
        given_by[source] += lengths[source][document]
        progress.append((middle, given_by.copy()))
    assert sum(given_by) <= num_tokens
    for number, own in enumerate(lengths):
        assert given_by[number] <= min(capacities[number], targets[number] + max(own) / 2)
    if sum(given_by) + max(map(max, lengths)) <= num_tokens:  # no document was refused for want of room
        for middle, given_until in progress:
            for number, own in enumerate(lengths):
                assert abs(given_until[number] - middle * targets[number]) <= max(own)
