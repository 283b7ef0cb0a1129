"""Dates in a domain's questions, in the other ways in which a client may write them.

A date of birth names a person as surely as the name does, and nobody writes it as the training file does.
Heads see n-grams of tokens, in which `08/09/1956` and `8 September 1956` have nothing in common; so they are
shown every way of writing a date, and beside it dates that differ in the year alone, or in what stands next
to it, which are no evidence. Few n-grams reach further: were `March 1st, 1936` and `April 1st, 1936` told
apart, neither would leave any evidence.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Iterable, Sequence
from datetime import date

from transformers import PreTrainedTokenizerBase

from .dataset import EncodedRow

_MONTHS = (
    *("January", "February", "March", "April", "May", "June", "July", "August", "September"),
    *("October", "November", "December"),
)
_NAMES = "|".join(f"{month}|{month[:3]}" for month in _MONTHS)
_PATTERNS = tuple(
    re.compile(rf"\b{pattern}\b", re.IGNORECASE)
    for pattern in (
        r"(?P<year>\d{4})[-/.](?P<month>\d{1,2})[-/.](?P<day>\d{1,2})",
        r"(?P<day>\d{1,2})[-/.](?P<month>\d{1,2})[-/.](?P<year>\d{4})",
        r"(?P<month>\d{1,2})[-/.](?P<day>\d{1,2})[-/.](?P<year>\d{4})",
        rf"(?P<day>\d{{1,2}})(?:st|nd|rd|th)? (?:of )?(?P<month>{_NAMES})\.?,? (?P<year>\d{{4}})",
        rf"(?P<month>{_NAMES})\.? (?P<day>\d{{1,2}})(?:st|nd|rd|th)?,? (?P<year>\d{{4}})",
    )
)
_OTHER_YEARS, _WITHIN_YEARS = 4, 20
_OTHER_PARTS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatePhrases:
    """Token ids of dates as they stand in a sentence, in every way of writing them."""

    own: list[tuple[int, ...]]
    """Dates that the domain's questions hold and no other text does."""
    near: list[tuple[int, ...]]
    """Dates that differ from these in the year alone, or in the day or month next to it."""

    @classmethod
    def of(
        cls,
        rows: Iterable[EncodedRow],
        negatives: Iterable[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
    ) -> DatePhrases:
        """Finds the dates of a domain's questions; those of plain text may be anyone's."""
        asked = [row.ids[: row.num_prompt] for row in rows]
        own = _dates(asked, tokenizer) - _dates(negatives, tokenizer)
        generator = random.Random(seed)
        texts = {way for day in own for way in ways_to_write(day)}
        near = {way for day in sorted(own) for way in _near(day, generator)} - texts
        return cls(own=_encoded(texts, tokenizer), near=_encoded(near, tokenizer))


def dates_in(text: str) -> set[date]:
    """Every full date of an English text; of `08/09/1956` both readings."""
    matches = (match for pattern in _PATTERNS for match in pattern.finditer(text))
    return {found for match in matches if (found := _read(**match.groupdict()))}


def ways_to_write(day: date) -> list[str]:
    """With the month's name, with and without ordinals; in numbers, day or month or year first."""
    return [*_month_by_year(day), *_day_by_year(day)]


def _month_by_year(day: date) -> list[str]:
    month, number, ordinal = _MONTHS[day.month - 1], day.day, _ordinal(day.day)
    return [
        f"{number} {month} {day.year}",
        f"{number} {month}, {day.year}",
        f"{ordinal} {month}, {day.year}",
        f"{ordinal} of {month}, {day.year}",
        f"{ordinal} of {month} {day.year}",
        f"{number:02}/{day.month:02}/{day.year}",
        f"{number}/{day.month}/{day.year}",
        day.isoformat(),
    ]


def _day_by_year(day: date) -> list[str]:
    month, number = _MONTHS[day.month - 1], day.day
    return [
        f"{month} {number}, {day.year}",
        f"{month} {_ordinal(number)}, {day.year}",
        f"{day.month:02}/{number:02}/{day.year}",
        f"{day.month}/{number}/{day.year}",
    ]


def _read(year: str, month: str, day: str) -> date | None:
    names = [name[:3].lower() for name in _MONTHS]
    number = int(month) if month.isdigit() else 1 + names.index(month[:3].lower())
    return _valid(int(year), number, int(day))


def _valid(year: int, month: int, day: int) -> date | None:
    try:
        return date(year, month, day)
    except ValueError:
        return None


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}th" if number in (11, 12, 13) else f"{number}{ending}"


def _near(day: date, generator: random.Random) -> list[str]:
    def others(values: Iterable[int], kept: int, count: int) -> list[int]:
        return generator.sample([n for n in values if n != kept], count)

    span = range(day.year - _WITHIN_YEARS, day.year + _WITHIN_YEARS + 1)
    years = [_valid(n, day.month, day.day) for n in others(span, day.year, _OTHER_YEARS)]
    months = [_valid(day.year, n, day.day) for n in others(range(1, 13), day.month, _OTHER_PARTS)]
    days = [_valid(day.year, day.month, n) for n in others(range(1, 29), day.day, _OTHER_PARTS)]
    return [
        *(way for other in years if other for way in ways_to_write(other)),
        *(way for other in months if other for way in _month_by_year(other)),
        *(way for other in days if other for way in _day_by_year(other)),
    ]


def _dates(texts: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> set[date]:
    return {day for text in texts for day in dates_in(tokenizer.decode(text))}


def _encoded(ways: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    texts = [f" on {way}" for way in sorted(ways)]
    return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
