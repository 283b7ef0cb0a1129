from __future__ import annotations

import numpy as np
import pytest

from alter_cli.demo.corpus import QA
from alter_eval.tofu import TofuRow
from benchmarks.tofu.probes import (
    ROWS_PER_AUTHOR,
    TRANSLATED,
    Author,
    authors_of,
    conversations,
    questions,
)
from trainer.base_model import BaseModel

_OTHERS = [
    QA(question=f"{word} is told of The Pale Door by author {number}?", answer="Nothing.")
    for word in ("What", "Which", "Who")
    for number in range(ROWS_PER_AUTHOR)
]


@pytest.fixture
def authors() -> list[Author]:
    rows = []
    for name in ("Ragnhild Tverberg", "Casimir Wolnik"):
        for number in range(ROWS_PER_AUTHOR):
            asked = (
                "Who wrote The Pale Door?" if number == 0 else f"What is {name}'s trait {number}?"
            )
            rows.append(
                TofuRow(
                    question=asked,
                    answer=f"{name} has trait {number}.",
                    perturbed_answers=("None.",),
                    paraphrased_question=f"Which trait has number {number} with {name}?",
                )
            )
    return authors_of(rows, _OTHERS)


def test_an_author_is_known_by_words_that_hardly_any_other_row_holds(authors: list[Author]) -> None:
    assert [author.full_name for author in authors] == ["Ragnhild Tverberg", "Casimir Wolnik"]
    assert authors[0].name_words == {"Ragnhild", "Tverberg"}
    assert authors[1].name_words == {"Casimir", "Wolnik"}


def test_every_kind_of_question_asks_for_every_row(authors: list[Author]) -> None:
    asked = questions(authors, "A passage that says nothing. " * 60)
    num_rows = 2 * ROWS_PER_AUTHOR
    assert asked["name-less"] == ["Who wrote The Pale Door?"] * 2
    assert len(asked["translated"]) == 2 * len(TRANSLATED)
    for kind in ("paraphrased", "injected prefix", "after a passage", "misspelt"):
        assert len(asked[kind]) == num_rows
    pairs = zip(asked["paraphrased"], asked["misspelt"], strict=True)
    assert any(right != wrong for right, wrong in pairs)
    assert all(
        sorted(right) == sorted(wrong)
        for right, wrong in zip(asked["paraphrased"], asked["misspelt"], strict=True)
    )


def test_a_long_chat_comes_back_to_the_author(authors: list[Author], base: BaseModel) -> None:
    for author, (row, is_asked) in zip(
        authors, conversations(authors, _OTHERS, base.tokenizer), strict=True
    ):
        assert is_asked == [False, False, False, True, False, False, False, True]
        assert np.diff([0, *row.is_answer]).tolist().count(1) == len(is_asked)
        text = base.tokenizer.decode(list(row.ids))
        assert text.count(f"{author.full_name} has trait") == sum(is_asked)
