from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.batches import IGNORED, at_step, by_length, make_batch, sample_rows
from trainer.dataset import EncodedRow


def _row(*ids: int, prompt: int) -> EncodedRow:
    return EncodedRow(ids=ids, is_answer=tuple(place >= prompt for place in range(len(ids))))


ROWS = [_row(5, 6, 7, prompt=1), _row(8, 9, prompt=1), _row(1, 2, 3, 4, 5, prompt=3)]


@given(
    num_rows=st.integers(1, 23),
    batch_rows=st.integers(1, 9),
    epoch=st.integers(0, 4),
    seed=st.integers(0, 9),
)
def test_every_epoch_shows_every_row_once(
    num_rows: int, batch_rows: int, epoch: int, seed: int
) -> None:
    rows = [_row(*range(length % 5 + 2), prompt=1) for length in range(num_rows)]
    per_epoch = -(-num_rows // min(batch_rows, num_rows))
    seen = [
        index
        for step in range(epoch * per_epoch, (epoch + 1) * per_epoch)
        for index in at_step(rows, batch_rows, step, seed)
    ]
    assert sorted(seen) == list(range(num_rows))


def test_labels_stand_where_the_answer_is_predicted() -> None:
    batch = make_batch(ROWS, [0, 2], pad_id=0)
    assert batch.labels.tolist() == [
        [6, 7, IGNORED, IGNORED, IGNORED],
        [IGNORED, IGNORED, 4, 5, IGNORED],
    ]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_values_are_aligned_to_tokens_or_to_their_labels() -> None:
    values = [torch.arange(len(row.ids)) + 10.0 * index for index, row in enumerate(ROWS)]
    batch = make_batch(ROWS, [1, 0], pad_id=0)
    assert batch.align(values).tolist() == [[10, 11, 0], [0, 1, 2]]
    assert batch.align_labels(values).tolist() == [[11, 0, 0], [1, 2, 0]]


def test_batches_by_length_hold_every_row_and_stay_small() -> None:
    rows = [_row(*range(length), prompt=1) for length in (9, 2, 4, 7, 3)]
    batches = list(by_length(rows, batch_tokens=12))
    assert sorted(index for batch in batches for index in batch) == [0, 1, 2, 3, 4]
    assert all(len(b) * max(len(rows[i].ids) for i in b) <= 12 for b in batches)


def test_sampling_keeps_to_its_budget_and_to_its_seed() -> None:
    rows = [_row(*range(5), prompt=1) for _ in range(20)]
    chosen = sample_rows(rows, 23, seed=3)
    assert len(chosen) == 4
    assert chosen == sample_rows(rows, 23, seed=3)
    assert len(sample_rows(rows, 2, seed=3)) == 1
