from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.dataset import EncodedRow
from trainer.windows import DomainWindows, NegativeWindows, window_keys, windows_of


def _row(ids: list[int], prompt: int) -> EncodedRow:
    return EncodedRow(ids=tuple(ids), is_answer=tuple(n >= prompt for n in range(len(ids))))


def test_windows_are_causal_and_marked_where_text_begins() -> None:
    assert windows_of([7, 8, 9], 3).tolist() == [[0, 0, 8], [0, 8, 9], [8, 9, 10]]


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=2, max_size=40))
def test_keys_are_equal_exactly_where_windows_are(windows: list[list[int]]) -> None:
    array = np.array(windows)
    keys = window_keys(array)
    same_window = (array[:, None] == array[None]).all(-1)
    assert np.array_equal(keys[:, None] == keys[None], same_window)


def test_what_negatives_hold_is_never_a_trace() -> None:
    rng = np.random.default_rng(0)
    common = [rng.integers(0, 40, 30).tolist() for _ in range(50)]
    name = [71, 72, 73]
    rows = [_row([*common[n][:6], *name, *common[n][6:12]], prompt=9) for n in range(4)]
    negatives = NegativeWindows.of(common, 4)
    domain = DomainWindows.of(rows, negatives, 4)
    held = np.isin(window_keys(domain.windows), window_keys(negatives.windows))
    assert not (domain.weight[held] > 0).any()
    places = domain.starts[2] + np.array([7, 8])
    assert (domain.weight[places] > 0).all(), "the name, from its second token on"
    assert (domain.suffix_length[held] == 5).all()


def test_windows_across_known_bigrams_are_less_rare_than_across_new_ones() -> None:
    texts = [[1, 2, 3, 4, 5, 6] * 10, [3, 9, 1, 2] * 10]
    negatives = NegativeWindows.of(texts, 3)
    windows = np.array([[10, 2, 3], [6, 10, 4]])  # ids are shifted by one
    known, new = negatives.log_rarity(windows)[:, -1]
    assert new < known
    chained = negatives.log_rarity(windows)
    assert (np.diff(chained, axis=1) <= 0).all(), "longer is never likelier"
