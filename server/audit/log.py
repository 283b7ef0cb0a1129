"""The audit log on disk: one table that only grows.

Written in one transaction per record that holds the write lock from before the head is read, so records of
several threads and processes make one chain. Synced to disk before `append` returns. Triggers refuse what
is not an append: they stop mistakes, and `verify` finds what goes round them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sqlite3
import threading
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    create_engine,
    insert,
    select,
)
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from alter_core.errors import AuditError, AuditTamperedError

from .record import EMPTY, AuditEntry, AuditRecord, Head, verify_chain

LOCK_TIMEOUT_S = 10.0
"""For how long an append waits for other processes."""

metadata = MetaData()
audit_records = Table(
    "audit_records",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=False),
    Column("time", String, nullable=False),
    Column("actor", String, nullable=False),
    Column("request_id", String, nullable=False),
    Column("action", String, nullable=False),
    Column("domain", String),
    Column("epoch_before", Integer),
    Column("epoch_after", Integer),
    Column("digest", String),
    Column("reason", String),
    Column("outcome", String, nullable=False),
    Column("error", String),
    Column("previous_hash", String, nullable=False),
    Column("hash", String, nullable=False),
)
_TRIGGERS = (
    """CREATE TRIGGER IF NOT EXISTS audit_records_no_update BEFORE UPDATE ON audit_records
    BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END""",
    """CREATE TRIGGER IF NOT EXISTS audit_records_no_delete BEFORE DELETE ON audit_records
    BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END""",
    # Also against INSERT OR REPLACE, which deletes without asking the trigger above.
    """CREATE TRIGGER IF NOT EXISTS audit_records_append BEFORE INSERT ON audit_records
    WHEN NEW.sequence IS NOT (SELECT COALESCE(MAX(sequence), 0) + 1 FROM audit_records)
    BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END""",
)


class AuditLog:
    """Appends to, reads and verifies one log. Several may be open on the same file."""

    def __init__(self, engine: Engine, place: str) -> None:
        self._engine = engine
        self._place = place
        self._lock = threading.Lock()
        self._owed: list[AuditEntry] = []
        self._seen = EMPTY
        self.on_failure: list[Callable[[], None]] = []
        """Called whenever a record cannot be written, on the thread that would have."""

    @classmethod
    def open(cls, path: Path) -> AuditLog:
        """The log at `path`, begun if there is none, for its owner alone; its chain is verified.

        Raises: AuditError if it cannot be written, AuditTamperedError.
        """
        path = path.expanduser().absolute()
        with _reported(str(path), "written"):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
            log = cls(_sqlite(path), str(path))
            with log._begin() as connection:
                create(connection)
        log._seen = log.verify()
        return log

    @classmethod
    def open_to_read(cls, path: Path) -> AuditLog:
        """An existing log, for reading. Raises: AuditError if there is none."""
        path = path.expanduser().absolute()
        with _reported(str(path), "read"):
            path.stat()
            return cls(_sqlite(path, is_read_only=True), str(path))

    def append(self, entry: AuditEntry, *, is_owed: bool = False) -> AuditRecord:
        """Writes a record, durably. `is_owed`: of what has happened already; if it cannot be written
        now, it is before the next one.

        Raises: AuditError, and nothing is written; AuditTamperedError if the log does not hold what
        it held before.
        """
        with self._lock:
            try:
                with _reported(self._place, "written"), self._begin() as connection:
                    self._check_seen(connection)
                    for owed in self._owed:
                        append_record(connection, owed)
                    record = append_record(connection, entry)
            except AuditError:
                if is_owed:
                    self._owed.append(entry)
                for callback in self.on_failure:
                    callback()
                raise
            self._owed.clear()
            self._seen = Head(record.sequence, record.hash)
            return record

    @property
    def num_owed(self) -> int:
        """Records of what has happened that are not written yet."""
        return len(self._owed)

    def records(self) -> Generator[AuditRecord]:
        """All records in order. Raises: AuditError."""
        with _reported(self._place, "read"), self._engine.connect() as connection:
            for row in connection.execute(select(audit_records).order_by(audit_records.c.sequence)):
                yield AuditRecord(**row._mapping)

    def records_of(self, request_id: str) -> list[AuditRecord]:
        """The records of one request, in order. Raises: AuditError."""
        query = select(audit_records).where(audit_records.c.request_id == request_id)
        with _reported(self._place, "read"), self._engine.connect() as connection:
            found = connection.execute(query.order_by(audit_records.c.sequence))
            return [AuditRecord(**row._mapping) for row in found]

    def head(self) -> Head:
        """Sequence and hash of the last record. Raises: AuditError."""
        with _reported(self._place, "read"), self._engine.connect() as connection:
            return _head(connection)

    def verify(self, anchor: Head | None = None) -> Head:
        """See `verify_chain`. Raises: AuditError, AuditTamperedError."""
        with contextlib.closing(self.records()) as records:
            return verify_chain(records, anchor)

    @contextlib.contextmanager
    def _begin(self) -> Iterator[Connection]:
        """A transaction that has the write lock; it ends with the connection if anything fails."""
        with self._engine.connect() as connection:
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection
            connection.exec_driver_sql("COMMIT")

    def _check_seen(self, connection: Connection) -> None:
        query = select(audit_records.c.hash).where(audit_records.c.sequence == self._seen.sequence)
        if (
            self._seen != EMPTY
            and connection.execute(query).scalar_one_or_none() != self._seen.hash
        ):
            raise AuditTamperedError(
                f"The audit log {self._place} was cut back or replaced while the server ran",
                expected=f"record {self._seen}",
                got="none, or another",
                fix="Keep the file as evidence, put the log back, and restart the server.",
            )


def create(connection: Connection) -> None:
    """Makes the table and its triggers where they are missing."""
    metadata.create_all(connection)
    if connection.dialect.name == "sqlite":
        for trigger in _TRIGGERS:
            connection.exec_driver_sql(trigger)


def append_record(connection: Connection, entry: AuditEntry) -> AuditRecord:
    """Continues the chain within a transaction of the caller's, who lets nobody else write meanwhile."""
    record = AuditRecord.after(_head(connection), entry)
    connection.execute(insert(audit_records).values(**dataclasses.asdict(record)))
    return record


def _head(connection: Connection) -> Head:
    row = connection.execute(
        select(audit_records.c.sequence, audit_records.c.hash)
        .order_by(audit_records.c.sequence.desc())
        .limit(1)
    ).one_or_none()
    return EMPTY if row is None else Head(*row)


def _sqlite(path: Path, *, is_read_only: bool = False) -> Engine:
    """Connects anew each time, never to a file that has been removed, and never creates one."""

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"{path.as_uri()}?mode={'ro' if is_read_only else 'rw'}",
            uri=True,
            timeout=LOCK_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
        )
        # Bytes that are no text are for `verify` to find.
        connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        if not is_read_only:
            connection.execute("PRAGMA journal_mode = WAL").close()
            connection.execute("PRAGMA synchronous = FULL").close()
        return connection

    return create_engine("sqlite://", creator=connect, poolclass=NullPool, hide_parameters=True)


@contextlib.contextmanager
def _reported(place: str, done: str) -> Iterator[None]:
    try:
        yield
    except (OSError, SQLAlchemyError, sqlite3.Error) as error:
        cause = getattr(error, "orig", None) or error
        raise AuditError(
            f"The audit log {place} cannot be {done}",
            expected="a file on a local disk with room, that this user may read and write",
            got=getattr(cause, "strerror", None) or str(cause) or type(cause).__name__,
            fix="Set --alter-audit-log or ALTER_AUDIT_LOG, or make room and mend its permissions.",
        ) from error
