"""What of a bundle's evaluation may be shown: numbers, and nothing that could hold text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alter_core.bundle import EVALUATION, read_manifest
from alter_core.errors import BundleTamperedError


def read_figures(folder: Path, digest: str) -> dict[str, Any] | None:
    """The figures of a bundle's evaluation. Its weights are read, and verified, by the workers.

    Raises: BundleTamperedError.
    """
    manifest = read_manifest(folder)
    expected = manifest.files.get(EVALUATION)
    if manifest.digest == digest and expected is None:
        return None
    try:
        data = (folder / EVALUATION).read_bytes()
    except OSError:
        data = b""
    if manifest.digest != digest or hashlib.sha256(data).hexdigest() != expected:
        raise BundleTamperedError(
            "The bundle changed after it was verified", expected=digest, got="something else"
        )
    return _figures(json.loads(data))


def _figures(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of an evaluation, and nothing that could hold text."""
    figures: dict[str, Any] = {}
    for name, value in evaluation.items():
        if isinstance(value, Mapping):
            figures[name] = _figures(value)
        elif isinstance(value, bool | int | float):
            figures[name] = value
    return figures
