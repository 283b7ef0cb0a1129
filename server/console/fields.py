"""What forms hold, as values. Everything here raises ConfigError."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

from alter_core.errors import ConfigError


def text_of(given: Mapping[str, str], name: str) -> str:
    """The text of a field that may not be empty."""
    text = given.get(name, "").strip()
    if not text:
        raise ConfigError(
            f"The field `{name}` is empty", expected="a value", got="none", fix="Fill it in."
        )
    return text


def choice_of(given: Mapping[str, str], name: str, choices: Sequence[str]) -> str:
    """One of `choices`, the first if the field is missing."""
    text = given.get(name, choices[0])
    if text not in choices:
        raise ConfigError(
            f"The field `{name}` has no such choice",
            expected=" or ".join(choices),
            got=repr(text[:40]),
            fix="Choose one of them.",
        )
    return text


def epoch_of(given: Mapping[str, str]) -> int:
    """The epoch that a decision was made on."""
    text = text_of(given, "epoch")
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(
            "The epoch is not a number", expected="digits", got=repr(text[:40]), fix="Start again."
        )
    return int(text)


def deadline_of(given: Mapping[str, str]) -> datetime | None:
    """A time in UTC, if there is one."""
    text = given.get("deadline", "")
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            "The deadline is no time",
            expected="a date and a time, in UTC",
            got=repr(text[:40]),
            fix="For instance 2026-12-01T12:00.",
        ) from None
    return time.replace(tzinfo=time.tzinfo or UTC)
