import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.packing import IGNORED, Shards, batch_of_rows, documents_of, num_rows, num_targets

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
