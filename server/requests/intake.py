"""What may be asked to be forgotten: checks of an upload, before anything of it is kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import fsspec

from alter_core.errors import ConfigError, TrainingDataError
from alter_core.rows import Row, check_disjoint, data_digest, parse_rows, read_rows

from .records import Approval
from .workspace import json_lines

MAX_ROWS = 20_000
MAX_DOCUMENTS = 1_000
_SHORT_DIGEST = 16
_MIN_DOCUMENT_WORDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upload:
    """What somebody wants forgotten. Texts of it are in no `repr`."""

    domain: str
    forget: Sequence[dict[str, Any]] = dataclasses.field(default=(), repr=False)
    """Rows, as lines of a training file."""
    documents: Sequence[dict[str, str]] = dataclasses.field(default=(), repr=False)
    """`name` and `text` of each."""
    retain: Sequence[dict[str, Any]] = dataclasses.field(default=(), repr=False)
    """Rows to be kept, in place of the server's own sample."""
    approval: Approval = "automatic"
    deadline: datetime | None = None
    reason: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digests:
    """What is recorded of an upload's content."""

    forget_digest: str
    row_digests: tuple[str, ...]
    retain_digest: str
    num_retain_rows: int


def check_upload(upload: Upload, default_retain: Sequence[Path], now: datetime) -> Digests:
    """Raises: TrainingDataError."""
    rows = _rows("forget", upload.forget)
    documents = [_document_digest(number, each) for number, each in enumerate(upload.documents, 1)]
    if not rows and not documents:
        raise TrainingDataError(
            "There is nothing to forget in this request",
            expected="rows under `forget`, or `documents`",
            got="neither",
            fix="Add what is to be forgotten.",
        )
    _check_count("rows", len(rows), MAX_ROWS)
    _check_count("documents", len(documents), MAX_DOCUMENTS)
    if upload.deadline is not None and upload.deadline <= now:
        raise TrainingDataError(
            "The deadline has passed already",
            expected=f"a time after {now.isoformat(timespec='seconds')}",
            got=upload.deadline.isoformat(timespec="seconds"),
            fix="Correct it, or leave it out.",
        )
    retain = _rows("retain", upload.retain) or _default_rows(default_retain)
    check_disjoint({"forget": rows, "retain": retain})
    digests = [*(row.digest for row in rows), *documents]
    return Digests(
        forget_digest=_digest("\n".join(digests).encode()),
        row_digests=tuple(sorted({digest[:_SHORT_DIGEST] for digest in digests})),
        retain_digest=f"sha256:{data_digest(retain).sha256}",
        num_retain_rows=len(retain),
    )


def parse_file(name: str, data: bytes) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows of a JSON Lines file, or the one document that any other text is.

    Raises: TrainingDataError if it is empty or not UTF-8.
    """
    if name.endswith((".jsonl", ".ndjson")):
        parse_rows(data, Path(name))
        return [json.loads(line) for line in data.split(b"\n") if line], []
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TrainingDataError(
            "A document is not UTF-8",
            expected="text in UTF-8",
            got=f"an invalid byte at {error.start}",
            fix="Convert it, or send its text alone.",
        ) from None
    if not text.strip():
        raise TrainingDataError(
            "A document is empty",
            expected="a text",
            got=f"{len(data)} bytes without a word",
            fix="Leave it out, or check how its text was extracted.",
        )
    return [], [{"name": name, "text": text}]


def parse_files(
    files: Iterable[tuple[str, bytes]],
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows and documents of several files, as names and contents. Raises: TrainingDataError."""
    rows: list[dict[str, Any]] = []
    documents: list[dict[str, str]] = []
    for name, data in files:
        more_rows, more_documents = parse_file(name, data)
        rows += more_rows
        documents += more_documents
    return rows, documents


def parse_retain(files: Iterable[tuple[str, bytes]]) -> list[dict[str, Any]]:
    """Rows of files that may hold nothing else. Raises: TrainingDataError, ConfigError for a document."""
    rows, documents = parse_files(files)
    if documents:
        raise ConfigError(
            "A retain sample is rows",
            expected="files whose names end in .jsonl",
            got=", ".join(each["name"] for each in documents),
            fix="Write one row a line.",
        )
    return rows


def read_source(
    source: Path | str, max_bytes: int
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """What the file at a path, or at a URL, holds; see `parse_file`. Raises: TrainingDataError."""
    try:
        # A path is opened as one: fsspec would read more into some names.
        with source.open("rb") if isinstance(source, Path) else fsspec.open(source, "rb") as file:
            data = file.read(max_bytes + 1)
    except (OSError, ValueError, ImportError) as error:
        raise TrainingDataError(
            "The source of the request cannot be read",
            expected="a file",
            got=type(error).__name__,
            fix="Check the path, and that the server's user may read it.",
        ) from None
    if len(data) > max_bytes:
        raise TrainingDataError(
            "The source of the request is too large",
            expected=f"at most {max_bytes} bytes",
            got="more",
            fix="Cut it into several domains, or restart the server with a larger --alter-max-upload-mib.",
        )
    return parse_file(str(source).rpartition("/")[2], data)


def _rows(name: str, rows: Sequence[dict[str, Any]]) -> list[Row]:
    return parse_rows(json_lines(rows), Path(name)) if rows else []


def _default_rows(files: Sequence[Path]) -> list[Row]:
    if not files:
        raise TrainingDataError(
            "There is no retain sample",
            expected="rows under `retain`, or a server with --alter-retain",
            got="neither",
            fix="Send a sample of what the model is to keep, or restart the server with one.",
        )
    return read_rows(files)


def _document_digest(number: int, document: dict[str, str]) -> str:
    text = document["text"].strip()
    if len(text.split()) < _MIN_DOCUMENT_WORDS:
        raise TrainingDataError(
            f"Document {number} is empty",
            expected=f"a text of {_MIN_DOCUMENT_WORDS} words or more",
            got=f"{len(text.split())} words",
            fix="Leave it out, or check how its text was extracted.",
        )
    try:
        return hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError:
        raise TrainingDataError(
            f"Document {number} holds half a surrogate pair",
            expected="text that has a form in UTF-8",
            got="other text",
            fix="Check how its text was extracted.",
        ) from None


def _check_count(what: str, count: int, most: int) -> None:
    if count > most:
        raise TrainingDataError(
            f"There are too many {what} in one request",
            expected=f"at most {most}",
            got=str(count),
            fix="Ask for several domains.",
        )


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def distinct_lines(parts: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without those that came before, told apart as training does."""
    rows = list(parts)
    parsed = parse_rows(json_lines(rows), Path("forget")) if rows else []
    return list({row.digest: line for row, line in zip(parsed, rows, strict=True)}.values())
