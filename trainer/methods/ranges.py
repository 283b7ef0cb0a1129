"""Checks of settings that every dataclass here makes."""

from __future__ import annotations

from typing import Any

from alter_core.errors import ConfigError


def check_range(settings: Any, name: str, is_valid: bool, expected: str) -> None:
    """Raises: ConfigError about the field of that name, unless `is_valid`."""
    if not is_valid:
        raise ConfigError(
            f"{name} is out of range", expected=expected, got=str(getattr(settings, name))
        )


def check_positive(settings: Any, *names: str) -> None:
    """Raises: ConfigError unless every named field is > 0."""
    for name in names:
        check_range(settings, name, getattr(settings, name) > 0, "> 0")
