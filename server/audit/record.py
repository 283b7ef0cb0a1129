"""One record of the audit log, and the chain through all of them.

hash = SHA-256 over the canonical JSON of all other fields, the hash of the record before among them.
So a record that is changed, removed, inserted or moved breaks the chain from there on. Records that are
cut off at the end break nothing, and a chain may be rewritten as a whole: only a head that is kept
elsewhere finds that.

Digests, names and figures only, and a case number: no text to be forgotten.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from alter_core.bundle import canonical_json
from alter_core.errors import AuditError, AuditTamperedError, ConfigError

Action = Literal[
    "start",
    "activate",
    "revoke",
    "apply",
    "request",
    "approve",
    "cancel",
    "delete-text",
    "base-answer",
]
"""`activate` and `revoke` change what the fleet is to apply; `apply` is one server that does so. `request`,
`approve`, `cancel` and `delete-text` are of unlearning requests; their digest is that of the upload.
`base-answer`: somebody was shown what the base model would answer."""
Outcome = Literal[
    "begun", "done", "created", "replaced", "unchanged", "revoked", "refused", "failed"
]
"""`begun` stands before the change is recorded in the registry, and another record with the same request id
after it. Where that one is missing, the server died in between, and the registry says what became of it."""

SERVER = "server"
"""The actor of what the server does by itself, when it starts."""

MAX_REASON_LENGTH = 200
GENESIS_HASH = "sha256:" + 64 * "0"
"""Stands for the hash before the first record."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cause:
    """Who asked for something, in which request, and why."""

    actor: str = SERVER
    """Name of the bearer token."""
    request_id: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    reason: str | None = None
    """A case number or the like, as `check_reason` lets through."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """What is to be recorded."""

    time: str = dataclasses.field(
        default_factory=lambda: datetime.now(UTC).isoformat(timespec="microseconds")
    )
    """ISO 8601, UTC."""
    actor: str
    request_id: str
    action: Action
    domain: str | None
    """None if the request did not name one that could exist."""
    epoch_before: int | None
    """None before there is an epoch."""
    epoch_after: int | None
    """None as long as it is not known."""
    digest: str | None
    """Digest of the bundle: activated, revoked or, at a start, the substrate's."""
    reason: str | None
    outcome: Outcome
    error: str | None
    """Kind of the error, as in the type of its problem document; never its text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuditRecord(AuditEntry):
    """What is recorded."""

    sequence: int
    """1, 2, 3, ..."""
    previous_hash: str
    hash: str

    @classmethod
    def after(cls, head: Head, entry: AuditEntry) -> AuditRecord:
        """The record that continues a chain."""
        record = cls(
            **dataclasses.asdict(entry),
            sequence=head.sequence + 1,
            previous_hash=head.hash,
            hash="",
        )
        return dataclasses.replace(record, hash=record.computed_hash())

    def computed_hash(self) -> str:
        """What `hash` must be."""
        fields = dataclasses.asdict(self)
        del fields["hash"]
        return "sha256:" + hashlib.sha256(canonical_json(fields)).hexdigest()

    def json(self) -> str:
        """One line of an export."""
        return canonical_json(dataclasses.asdict(self)).decode()


@dataclasses.dataclass(frozen=True)
class Head:
    """The last record of a log: what is kept elsewhere to prove later that nothing was cut off."""

    sequence: int
    hash: str

    def __str__(self) -> str:
        return f"{self.sequence} {self.hash}"

    @classmethod
    def parse(cls, text: str) -> Head:
        """Raises: ConfigError unless it is what `str` gives."""
        sequence, _, digest = text.strip().partition(" ")
        if not (sequence.isascii() and sequence.isdigit()) or not digest.startswith("sha256:"):
            raise ConfigError(
                "This is not the head of an audit log",
                expected="a sequence number, a space and a hash, as `alter audit head` prints them",
                got=repr(text[:100]),
                fix="Give what was kept, in quotes.",
            )
        return cls(int(sequence), digest)


def check_reason(reason: str) -> str:
    """A reason that can stand in the audit log as it is.

    Raises: ConfigError if it is empty, long, or has characters that could forge lines or hide text.
    """
    if not (0 < len(reason) <= MAX_REASON_LENGTH and reason.isprintable()):
        raise ConfigError(
            "The reason cannot be recorded",
            expected=f"1 to {MAX_REASON_LENGTH} printable characters, e.g. a case number",
            got=f"{len(reason)} characters{'' if reason.isprintable() else ', control characters'}",
            fix="Give the case number alone, and never text that is to be forgotten.",
        )
    return reason


def verify_chain(records: Iterable[AuditRecord], anchor: Head | None = None) -> Head:
    """The head of an unbroken chain, which goes through `anchor`.

    Raises: AuditTamperedError that names the first bad sequence.
    """
    head = EMPTY
    _check_anchor(head, anchor)
    for record in records:
        expected = head.sequence + 1
        if record.sequence != expected:
            is_missing = record.sequence > expected
            found = f"record {record.sequence} in its place"
            raise _broken(expected, "is missing" if is_missing else "is out of order", found)
        if record.previous_hash != head.hash:
            raise _broken(expected, "does not follow the one before", "another previous hash")
        if record.hash != _safe_hash(record):
            raise _broken(expected, "was changed", "content that does not give its hash")
        head = Head(record.sequence, record.hash)
        _check_anchor(head, anchor)
    if anchor is not None and anchor.sequence > head.sequence:
        raise _broken(head.sequence + 1, "was cut off", f"{head.sequence} records")
    return head


def _check_anchor(head: Head, anchor: Head | None) -> None:
    if anchor is not None and anchor.sequence == head.sequence and anchor != head:
        raise _broken(head.sequence, "is another than when the head was kept", head.hash)


def read_export(path: Path) -> Iterator[AuditRecord]:
    """The records of a JSON Lines file. Raises: AuditError, AuditTamperedError for a bad line."""
    number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):  # noqa: B007 - the error names it
                # Exactly the fields, and nothing that a reader of the file could take for one.
                if set(json.loads(line)) != _FIELDS:
                    raise ValueError
                yield _RECORD.validate_json(line, strict=True)
    except OSError as error:
        raise AuditError(
            f"The export {path} cannot be read",
            expected="a file that `alter audit export` wrote",
            got=error.strerror or type(error).__name__,
            fix="Check the path.",
        ) from error
    except (ValidationError, ValueError, TypeError) as error:
        raise _broken(number, "is unreadable", "a line that is not a record") from error


def _safe_hash(record: AuditRecord) -> str | None:
    """None for what is no record of ours, such as bytes where text should be."""
    try:
        return record.computed_hash()
    except (TypeError, ValueError):
        return None


def _broken(sequence: int, what: str, got: str) -> AuditTamperedError:
    return AuditTamperedError(
        f"The audit log is broken: record {sequence} {what}",
        expected=f"an unbroken chain through record {sequence}",
        got=got,
        fix="Keep the file as evidence, and compare it with an earlier export.",
    )


EMPTY = Head(0, GENESIS_HASH)
"""The head of a log without records."""

_RECORD = TypeAdapter(AuditRecord)
_FIELDS = {field.name for field in dataclasses.fields(AuditRecord)}
