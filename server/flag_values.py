"""What flags and environment variables of `alter serve` hold."""

from __future__ import annotations

from pathlib import Path


def absolute(path: Path | None) -> Path | None:
    """A path that means the same from any working directory."""
    return None if path is None else path.expanduser().absolute()


def split(text: str) -> tuple[str, ...]:
    """The parts between commas, without the empty ones."""
    return tuple(part.strip() for part in text.split(",") if part.strip())
