"""Where benchmark data lies, and how its files are read."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alter_core.errors import EvaluationError


def default_data_dir() -> Path:
    """`ALTER_DATA_DIR`, or the folder beside the project that development machines have."""
    return Path(os.environ.get("ALTER_DATA_DIR", Path.cwd().parent / "shared" / "data"))


def read_json_lines(path: Path, fields: Sequence[str], *, fix: str) -> list[dict[str, str]]:
    """Rows of a file with one JSON object a line, each with these text fields.

    Raises: EvaluationError naming the first line that does not fit, never its text.
    """
    lines = read_text(path, fix=fix).removesuffix("\n").split("\n")
    return [
        checked(_decoded(line), fields, f"{path.name} line {number}", fix=fix)
        for number, line in enumerate(lines, start=1)
    ]


def read_json_list(path: Path, *, fix: str) -> list[Any]:
    """The JSON list that a file holds. Raises: EvaluationError if it is none, or empty."""
    content = _decoded(read_text(path, fix=fix))
    if not isinstance(content, list) or not content:
        raise EvaluationError(
            f"{path} does not fit",
            expected="a JSON list of rows",
            got="an empty list" if content == [] else type(content).__name__,
            fix=fix,
        )
    return content


def read_text(path: Path, *, fix: str) -> str:
    """What a file holds. Raises: EvaluationError if it is missing, empty or no text."""
    try:
        content = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(
            f"{path} cannot be read", expected="UTF-8 text", got=type(error).__name__, fix=fix
        ) from None
    if not content.strip():
        raise EvaluationError(f"{path} is empty", expected="rows", got="none", fix=fix)
    return content


def checked(record: Any, fields: Sequence[str], place: str, *, fix: str) -> dict[str, str]:
    """The record, if each of the fields is text. Raises: EvaluationError."""
    got = None
    if not isinstance(record, dict):
        got = f"a {type(record).__name__}, or no JSON"
    elif missing := [field for field in fields if field not in record]:
        got = f"no {missing[0]!r}; the file may be of another version"
    elif any(not isinstance(record[field], str) or not record[field].strip() for field in fields):
        got = "an empty value, or one of another type"
    if got is not None:
        raise EvaluationError(
            f"{place} does not fit", expected=f"text under {', '.join(fields)}", got=got, fix=fix
        )
    return dict(record)


def _decoded(content: str) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None
