"""Rows of training data: JSON lines as an operator writes them, checked, not yet tokenised.

A line is one of

    {"question": ..., "answer": ...}       a user turn and the assistant's turn
    {"messages": [{"role", "content"}]}    a chat; every assistant turn is answer
    {"prompt": ..., "completion": ...}     raw text, no chat template, as /v1/completions sends it
    {"text": ...}                          plain text; every token is answer

Other fields of a line are ignored. No message here ever holds text of a row: rows are named by file and
line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alter_core.bundle import DataDigest
from alter_core.errors import TrainingDataError

_FORMATS = (
    ("question", "answer"),
    ("prompt", "completion"),
    ("messages",),
    ("text",),
)
_EXPECTED = '{"question", "answer"}, {"prompt", "completion"}, {"messages"} or {"text"}'
_MAX_NAMED_LINES = 5
"""So many lines are named in one message."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a training file, checked, not yet tokenised."""

    file: Path
    line: int
    """1-based line number."""
    turns: tuple[tuple[str, str], ...]
    """(role, content); the roles are `prompt` and `completion`, or `text`, where no chat is meant."""

    @property
    def digest(self) -> str:
        """SHA-256 of the row's content, blind to surrounding white space."""
        canonical = [[role, content.strip()] for role, content in self.turns]
        return hashlib.sha256(json.dumps(canonical, separators=(",", ":")).encode()).hexdigest()

    @property
    def place(self) -> str:
        """File name and line, for messages."""
        return f"{self.file.name} line {self.line}"


def read_rows(paths: Sequence[Path]) -> list[Row]:
    """Reads and checks training files.

    Raises: TrainingDataError naming file and line of the first problem.
    """
    rows = [row for path in paths for row in _read_file(path)]
    if not rows:
        raise TrainingDataError(
            "A training set is empty", expected="at least one row", got="no training file"
        )
    return rows


def parse_rows(data: bytes, path: Path) -> list[Row]:
    """The rows of JSON lines; `path` is what they are named by.

    Raises: TrainingDataError naming the first line that is none.
    """
    lines = data.split(b"\n")
    if lines[-1] == b"":
        lines.pop()
    if not lines:
        raise TrainingDataError(f"{path} is empty", expected=_EXPECTED, got="nothing")
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1)]


def check_disjoint(sets: Mapping[str, Sequence[Row]]) -> None:
    """Raises: TrainingDataError if two sets share a row; it names their lines, not their text."""
    owners: dict[str, tuple[str, Row]] = {}
    shared: list[str] = []
    for name, rows in sets.items():
        for row in rows:
            owner, first = owners.setdefault(row.digest, (name, row))
            if owner != name:
                shared.append(f"{first.place} ({owner}) = {row.place} ({name})")
    if shared:
        named = "; ".join(shared[:_MAX_NAMED_LINES])
        more = len(shared) - _MAX_NAMED_LINES
        raise TrainingDataError(
            "Training sets share rows, which cannot be forgotten and kept at once",
            expected="every row in one set",
            got=named + (f"; and {more} more" if more > 0 else ""),
            fix="Remove these lines from one of the files.",
        )


def data_digest(rows: Iterable[Row]) -> DataDigest:
    """Digest over the rows in order, independent of file names and of unread fields."""
    digests = [row.digest for row in rows]
    return DataDigest(
        sha256=hashlib.sha256("\n".join(digests).encode()).hexdigest(), num_rows=len(digests)
    )


def _read_file(path: Path) -> list[Row]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TrainingDataError(
            f"The training file {path} cannot be read", expected="a file", got=type(error).__name__
        ) from None
    return parse_rows(data, path)


def _parse(path: Path, number: int, line: bytes) -> Row:
    def refuse(problem: str, got: str) -> TrainingDataError:
        return TrainingDataError(
            f"{path.name} line {number}: {problem}", expected=_EXPECTED, got=got
        )

    if not line.strip():
        raise refuse("the line is empty", "nothing")
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise refuse("the line is not UTF-8", f"an invalid byte at {error.start}") from None
    except ValueError:
        raise refuse("the line is not JSON", "undecodable text") from None
    if not isinstance(value, dict):
        raise refuse("the line is no JSON object", f"a {type(value).__name__}")
    formats = [fields for fields in _FORMATS if fields[0] in value]
    if len(formats) != 1:
        got = "fields of several formats" if formats else "none of their fields"
        raise refuse("the line's format is unclear", got)
    fields = formats[0]
    if missing := [field for field in fields if field not in value]:
        raise refuse("a field is missing", f"no {missing[0]!r}")
    if fields == ("messages",):
        turns = _messages(value["messages"], refuse)
    else:
        roles = ("user", "assistant") if fields[0] == "question" else fields
        turns = tuple((role, value[field]) for role, field in zip(roles, fields, strict=True))
    for (_, content), field in zip(turns, fields, strict=False):
        if not isinstance(content, str):
            raise refuse(f"{field!r} is not text", f"a {type(content).__name__}")
    if any(0xD800 <= ord(char) < 0xE000 for _, content in turns for char in content):
        raise refuse("the line holds half a surrogate pair", "text that has no UTF-8 form")
    if not turns[-1][1].strip():
        raise refuse("the answer is empty", "an empty string")
    return Row(file=path, line=number, turns=turns)


def _messages(value: Any, refuse: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise refuse("'messages' is no list of turns", f"a {type(value).__name__}")
    turns = []
    for message in value:
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            raise refuse("a message lacks a known role or text content", "something else")
        if role == "assistant" and not content.strip():
            raise refuse("the answer is empty", "an empty assistant turn")
        turns.append((role, content))
    if turns[-1][0] != "assistant" or len(turns) < 2:
        raise refuse("a chat must end with the assistant's answer", "no answer at its end")
    return tuple(turns)
