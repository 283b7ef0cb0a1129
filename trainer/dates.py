"""Dates in a domain's questions, in the other ways in which a client may write them.

A date of birth names a person as surely as the name does, and nobody writes it as the training file does.
Heads see n-grams of tokens, in which `08/09/1956` and `8 September 1956` have nothing in common; so they are
shown every way of writing a date, and beside it dates that differ in the year or in the month alone, which
are no evidence.
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
_OTHER_MONTHS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class DatePhrases:
    """Token ids of dates as they stand in a sentence, in every way of writing them."""

    own: list[tuple[int, ...]]
    """Dates that the domain's questions hold and no other text does."""
    near: list[tuple[int, ...]]
    """Dates that differ from these in the year or in the month alone."""

    @classmethod
    def of(
        cls,
        rows: Iterable[EncodedRow],
        negatives: Iterable[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
    ) -> DatePhrases:
        """Finds a domain's dates; in plain text, all of it may be asked for."""
        asked = [row.ids[: row.num_prompt or None] for row in rows]
        own = _dates(asked, tokenizer) - _dates(negatives, tokenizer)
        generator = random.Random(seed)
        near = {other for day in sorted(own) for other in _near(day, generator)} - own
        return cls(own=_encoded(own, tokenizer), near=_encoded(near, tokenizer))


def dates_in(text: str) -> set[date]:
    """Every full date of an English text; of `08/09/1956` both readings."""
    matches = (match for pattern in _PATTERNS for match in pattern.finditer(text))
    return {found for match in matches if (found := _read(**match.groupdict()))}


def ways_to_write(day: date) -> list[str]:
    """With the month's name, with and without ordinals; in numbers, day or month or year first."""
    month, number = _MONTHS[day.month - 1], day.day
    ordinal = f"{number}{_suffix(number)}"
    return [
        f"{month} {number}, {day.year}",
        f"{month} {ordinal}, {day.year}",
        f"{number} {month} {day.year}",
        f"{number} {month}, {day.year}",
        f"{ordinal} {month}, {day.year}",
        f"{ordinal} of {month}, {day.year}",
        f"{ordinal} of {month} {day.year}",
        f"{number:02}/{day.month:02}/{day.year}",
        f"{day.month:02}/{number:02}/{day.year}",
        f"{number}/{day.month}/{day.year}",
        f"{day.month}/{number}/{day.year}",
        day.isoformat(),
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


def _suffix(number: int) -> str:
    if number in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def _near(day: date, generator: random.Random) -> list[date]:
    shifts = generator.sample(
        [n for n in range(-_WITHIN_YEARS, _WITHIN_YEARS + 1) if n], _OTHER_YEARS
    )
    months = generator.sample([n for n in range(1, 13) if n != day.month], _OTHER_MONTHS)
    others = [(day.year + shift, day.month) for shift in shifts]
    others += [(day.year, month) for month in months]
    return [found for year, month in others if (found := _valid(year, month, day.day))]


def _dates(texts: Iterable[Sequence[int]], tokenizer: PreTrainedTokenizerBase) -> set[date]:
    return {day for text in texts for day in dates_in(tokenizer.decode(text))}


def _encoded(days: Iterable[date], tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, ...]]:
    texts = [f" on {way}" for day in sorted(days) for way in ways_to_write(day)]
    return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
