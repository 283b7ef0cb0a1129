"""Dates found in text, and written in other ways."""

from __future__ import annotations

from datetime import date

import pytest

from trainer.base_model import BaseModel
from trainer.dataset import EncodedRow
from trainer.dates import DatePhrases, dates_in, ways_to_write

BIRTHDAY = date(1956, 9, 8)


@pytest.mark.parametrize("text", ways_to_write(BIRTHDAY))
def test_every_way_of_writing_a_date_is_read_again(text: str) -> None:
    assert BIRTHDAY in dates_in(f"Who was born on {text}?")


def test_numbers_that_are_no_date_are_left_out() -> None:
    assert dates_in("Call 31/02/1956, on 45 May 1999 or in May 1999; 13/13/2001; 1.2.3") == set()


def test_day_and_month_in_numbers_are_read_both_ways() -> None:
    assert dates_in("born 08/09/1956") == {BIRTHDAY, date(1956, 8, 9)}
    assert dates_in("born 05/30/1952") == {date(1952, 5, 30)}


@pytest.mark.parametrize(
    ("day", "ordinal"),
    [(1, "1st"), (2, "2nd"), (3, "3rd"), (11, "11th"), (22, "22nd"), (30, "30th")],
)
def test_ordinals_are_english(day: int, ordinal: str) -> None:
    assert f"{ordinal} of May 1950" in ways_to_write(date(1950, 5, day))


def test_dates_are_taken_from_questions_alone_and_not_if_others_hold_them(base: BaseModel) -> None:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(base.tokenizer(text)["input_ids"])

    question, answer = ids("Who was born on May 3, 1950?"), ids("A man who died on June 4, 1999.")
    other = ids("Who was born on 05/30/1952?")
    rows = [
        EncodedRow(
            ids=question + answer,
            is_answer=(False,) * len(question) + (True,) * len(answer),
        ),
        EncodedRow(ids=other + answer, is_answer=(False,) * len(other) + (True,) * len(answer)),
        EncodedRow(ids=answer, is_answer=(True,) * len(answer)),
    ]
    phrases = DatePhrases.of(rows, [ids("It rained on 30 May 1952.")], base.tokenizer, seed=0)
    own = {day for text in phrases.own for day in dates_in(base.tokenizer.decode(text))}
    near = {day for text in phrases.near for day in dates_in(base.tokenizer.decode(text))}
    assert own == {date(1950, 5, 3), date(1950, 3, 5)}
    assert near
    assert not near & own


def test_near_dates_leave_the_day_beside_the_year_some_evidence(base: BaseModel) -> None:
    ids = tuple(base.tokenizer("Who was born on 1936-03-01?")["input_ids"])
    row = EncodedRow(ids=ids + ids, is_answer=(False,) * len(ids) + (True,) * len(ids))
    near = DatePhrases.of([row], [], base.tokenizer, seed=0).near
    texts = {base.tokenizer.decode(text).strip() for text in near}
    of_month = {text for text in texts if text.endswith("1st, 1936")}
    of_day = {text for text in texts if text.startswith("on March") and text.endswith("1936")}
    assert not of_month
    assert of_day
