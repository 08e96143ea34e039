import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SMALL

from model.network.packing import (
    IGNORED,
    Example,
    Shards,
    batch_of_examples,
    batch_of_rows,
    documents_of,
    fill_rows,
    num_rows,
    num_targets,
)
from model.network.transformer import Llama, ModelConfig, first_weights

CPU = torch.device("cpu")


def test_documents_lie_one_after_another_and_count_from_zero() -> None:
    documents = documents_of([3, 1, 2], CPU)
    assert documents.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert documents.boundaries.tolist() == [0, 3, 4, 6]
    assert documents.boundaries.dtype == torch.int32
    assert (documents.lengths, documents.longest) == ((3, 1, 2), 3)


def test_rows_predict_the_next_token_of_a_document_and_never_its_first() -> None:
    #                  document 0   | document 1            | document 2
    stream = np.array([1, 10, 11, 2,  1, 20, 21, 22, 23, 2,   1, 30], dtype=np.uint16)  # fmt: skip
    stream = Shards([stream[:4], stream[4:5], stream[5:]])
    starts = np.array([0, 4, 10])
    assert num_rows(stream, 5) == 2
    first = batch_of_rows(stream, starts, first_row=0, rows=1, context=5, device=CPU)
    assert first.ids.tolist() == [1, 10, 11, 2, 1]
    assert first.targets.tolist() == [10, 11, 2, IGNORED, 20]  # the last one's target lies in the next row
    assert first.documents.lengths == (4, 1)
    assert first.num_targets == 4
    second = batch_of_rows(stream, starts, first_row=1, rows=1, context=5, device=CPU)
    assert second.ids.tolist() == [20, 21, 22, 23, 2]  # goes on with document 1, as a document of its own
    assert second.targets.tolist() == [21, 22, 23, 2, IGNORED]
    assert second.documents.lengths == (5,)
    both = batch_of_rows(stream, starts, first_row=0, rows=2, context=5, device=CPU)
    assert both.documents.lengths == (4, 1, 5)
    last = batch_of_rows(stream, starts, first_row=2, rows=3, context=5, device=CPU)
    assert (last.ids.tolist(), last.targets.tolist()) == ([1, 30], [30, IGNORED])


@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=12),
    context=st.integers(2, 32),
    rows=st.integers(1, 4),
    num_shards=st.integers(1, 5),
)
def test_every_token_is_read_once_and_every_pair_within_a_document_predicted_once(
    lengths: list[int], context: int, rows: int, num_shards: int
) -> None:
    starts = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.uint32)  # each token is its place, counted from 1
    stream = Shards(np.array_split(tokens, min(num_shards, len(tokens))))
    read: list[int] = []
    predicted: list[int] = []
    total_rows = -(-len(stream) // context)
    for row in range(0, total_rows, rows):
        batch = batch_of_rows(stream, starts, row, rows, context, CPU)
        read += batch.ids.tolist()
        for token, target in zip(batch.ids.tolist(), batch.targets.tolist(), strict=True):
            if target != IGNORED:
                assert target == token + 1
                predicted.append(target)
        assert sum(batch.documents.lengths) == len(batch.ids)
        assert batch.documents.longest <= context
        end = min((row + rows) * context, len(stream) - 1)
        assert batch.num_targets == num_targets(starts, row * context, end)
    assert read == tokens.tolist()
    assert predicted == [token for token in tokens.tolist() if token - 1 not in starts]


def example_of(*tokens: int) -> Example:
    """Tokens from 100 on are learnt."""
    return Example(np.array(tokens, dtype=np.int32), np.array(tokens) >= 100)


def test_each_example_goes_where_it_leaves_the_least_room() -> None:
    #          0  1  2  3  4  5  6
    lengths = [6, 5, 4, 3, 2, 10, 1]
    assert fill_rows(lengths, range(7), 10) == [[0, 2], [1, 3, 4], [5], [6]]
    assert fill_rows(lengths, [6, 5, 4, 3, 2, 1, 0], 10) == [[6, 4, 3, 2], [5], [1], [0]]
    assert fill_rows([], [], 10) == []
    with pytest.raises(AssertionError, match="an example of 11 tokens does not fit into a row of 10"):
        fill_rows([11], [0], 10)


@given(lengths=st.lists(st.integers(1, 20), max_size=60), context=st.integers(20, 50), data=st.data())
def test_rows_hold_each_example_once_and_no_two_could_be_one(
    lengths: list[int], context: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(lengths))))
    rows = fill_rows(lengths, order, context)
    assert sorted(number for row in rows for number in row) == list(range(len(lengths)))
    filled = sorted(sum(lengths[number] for number in row) for row in rows)
    assert all(0 < tokens <= context for tokens in filled)
    assert len(filled) < 2 or filled[0] + filled[1] > context


def test_a_token_predicts_the_next_one_of_its_example_if_that_is_learnt() -> None:
    long = example_of(1, 5, 100, 101, 2, 6, 102)
    short = example_of(1, 7, 103)
    assert (long.num_targets, short.num_targets) == (3, 1)
    assert example_of(100, 101).num_targets == 1  # nothing predicts the first token
    batch = batch_of_examples([long, short], CPU)
    assert batch.ids.tolist() == [1, 7, 103, 1, 5, 100, 101, 2, 6, 102]
    assert batch.targets.tolist() == [IGNORED, 103, IGNORED, IGNORED, 100, 101, IGNORED, IGNORED, 102, IGNORED]
    assert batch.documents.lengths == (3, 7)
    assert batch.num_targets == 4


def test_a_batch_of_which_nothing_or_everything_is_learnt_is_refused() -> None:
    with pytest.raises(ValueError, match="none of the 5 tokens of a batch is to be learnt: the examples' mask"):
        batch_of_examples([example_of(1, 5), example_of(1, 6, 7)], CPU)
    with pytest.raises(ValueError, match="each of the 3 tokens of a batch is to be learnt"):
        batch_of_examples([example_of(100, 101, 102)], CPU)


@settings(max_examples=8)
@given(data=st.data())
@pytest.mark.parametrize("grouped", [False, True], ids=["heads alike", "grouped"])
def test_packed_examples_learn_what_each_alone_does(grouped: bool, data: st.DataObject) -> None:
    config = ModelConfig.model_validate({**SMALL, "num_key_value_heads": 2 if grouped else 4, "vocab_size": 64})
    model, generator = Llama(config, "off"), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(4 * first_weights(name, parameter.shape, config, generator))
    lengths = data.draw(st.lists(st.integers(2, 12), min_size=2, max_size=6))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    examples = []
    for length in lengths:
        is_learnt = rng.random(length) < 0.5
        is_learnt[0], is_learnt[-1] = False, True
        examples.append(Example(rng.integers(0, 64, length).astype(np.int32), is_learnt))

    def losses_of(chosen: list[Example]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The sum of each example's losses, the shortest first, and the gradients of them all."""
        batch = batch_of_examples(chosen, CPU)
        losses = model(batch.ids, batch.documents, batch.targets)
        gradients = torch.autograd.grad(losses.sum(), list(model.parameters()))
        return [part.sum().detach() for part in losses.split(list(batch.documents.lengths))], list(gradients)

    packed, gradients = losses_of(examples)
    alone = [losses_of([example]) for example in sorted(examples, key=lambda example: len(example.ids))]
    for together, (by_itself, _) in zip(packed, alone, strict=True):
        assert together.item() == pytest.approx(by_itself[0].item(), abs=1e-5)
    for together, *parts in zip(gradients, *(own for _, own in alone), strict=True):
        summed = torch.stack(parts).sum(dim=0)
        assert (together - summed).abs().max() <= 1e-5 * max(1.0, float(summed.abs().max()))
