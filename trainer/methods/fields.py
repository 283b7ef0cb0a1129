"""What all settings here share: checks of their fields, and how they are written down."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from alter_core.errors import ConfigError

TEXT = {"is_text": True}
"""Metadata of fields that hold text: only their digest is ever written."""


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


def described(settings: Any) -> dict[str, Any]:
    """A dataclass's fields as they may be written down: texts as digests."""
    found = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.metadata.get("is_text") and value is not None:
            value = {"sha256": hashlib.sha256(json.dumps(value).encode()).hexdigest()}
        found[field.name] = value
    return found
