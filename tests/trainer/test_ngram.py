from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.ngram import ngram_nll

VOCABULARY = 6
texts = st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=8), max_size=6)


@given(known=texts, context=st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=5))
def test_behind_any_context_the_vocabulary_shares_a_probability_of_1(
    known: list[list[int]], context: list[int]
) -> None:
    rows = [[*context, token] for token in range(VOCABULARY)]
    last = [nll[-1] for nll in ngram_nll(known, rows, VOCABULARY)]
    assert torch.stack(last).neg().exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_a_probability_by_hand() -> None:
    # Token 1 follows 0 twice, token 2 once; over all, six tokens of three kinds.
    (nll,) = ngram_nll([[0, 1], [0, 1], [0, 2]], [[0, 1]], VOCABULARY)
    single = (2 + 3 / VOCABULARY) / (6 + 3)
    assert nll.item() == pytest.approx(-math.log((2 + 2 * single) / (3 + 2)))


def test_without_any_text_every_token_is_as_likely() -> None:
    (nll,) = ngram_nll([], [[0, 3, 3]], VOCABULARY)
    assert nll.tolist() == pytest.approx([math.log(VOCABULARY)] * 2)


def test_what_stood_there_before_is_likelier() -> None:
    known = [[0, 1, 2, 3, 4]]
    same, other = ngram_nll(known, [[0, 1, 2, 3], [0, 1, 2, 5]], VOCABULARY)
    assert same[-1] < 0.5
    assert other[-1] > same[-1] + 1
    assert same[:-1].tolist() == other[:-1].tolist()
