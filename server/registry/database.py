"""Connections to the registry's database: durable commits, bounded waits, one kind of error.

SQLite: write-ahead log with full synchronisation; a write takes the lock when it begins.
PostgreSQL: READ COMMITTED; writers meet at an advisory lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
from sqlalchemy import URL, Connection, create_engine, event, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.orm import Session

from alter_core.errors import AlterError, ConfigError, RegistrySchemaError, RegistryUnavailableError

from .migrations import upgrade

logger = logging.getLogger(__name__)

CHANNEL = "alter_registry"
"""PostgreSQL's channel of notifications; their payload is ignored."""
DEFAULT_TIMEOUT_S = 5.0
_UPGRADE_LOCK = 0x414C544552  # "ALTER"
_LOG_LOCK = _UPGRADE_LOCK + 1
_PREPARE_POSTGRESQL = """
SELECT set_config('statement_timeout', %s, false),
       set_config('lock_timeout', %s, false),
       set_config('idle_in_transaction_session_timeout', %s, false),
       set_config('synchronous_commit', CASE
           WHEN current_setting('synchronous_commit') = 'remote_apply' THEN 'remote_apply'
           ELSE 'on' END, false),
       current_setting('fsync')
"""
"""One round trip: a server that comes back to a database under load opens several connections."""
_PATIENT_POSTGRESQL = """
SELECT set_config('statement_timeout', '0', true),
       set_config('lock_timeout', '60s', true),
       set_config('idle_in_transaction_session_timeout', '60s', true)
"""


class Database:
    """One database by its SQLAlchemy URL; synchronous, and safe to use from several threads."""

    def __init__(self, url: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        """`timeout_s`: longest wait for a connection, a lock or a statement.

        Raises: ConfigError for a URL that is none of a durable database.
        """
        self._url = _parse(url)
        self._timeout_s = timeout_s
        options: dict[str, Any] = {"hide_parameters": True, "pool_timeout": timeout_s}
        if self.is_postgresql:
            seconds = max(1, round(timeout_s))
            options |= {
                "isolation_level": "READ COMMITTED",
                "pool_pre_ping": True,
                "connect_args": {
                    "connect_timeout": max(2, seconds),  # libpq's least
                    "tcp_user_timeout": seconds * 1000,
                },
            }
        self.engine = create_engine(self._url, **options)
        self._writer = self.engine.execution_options(is_write=True)
        event.listen(self.engine, "connect", self._prepare)
        if not self.is_postgresql:
            event.listen(self.engine, "begin", _begin)

    @property
    def is_postgresql(self) -> bool:
        """Otherwise SQLite."""
        return self._url.get_backend_name() == "postgresql"

    def close(self) -> None:
        """Closes the connections."""
        self.engine.dispose()

    def upgrade(self) -> None:
        """Brings the schema to this version; one server at a time, all or nothing.

        Raises: RegistrySchemaError, RegistryUnavailableError.
        """
        with self._named_errors(), self._writer.begin() as connection:
            if self.is_postgresql:
                # Also between two statements a busy server may need longer than one that serves.
                connection.execute(text(_PATIENT_POSTGRESQL))
                connection.execute(
                    text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADE_LOCK}
                )
            _upgrade(connection)

    @contextlib.contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that changes nothing. Raises: RegistryUnavailableError."""
        with self._named_errors(), Session(self.engine) as session:
            yield session

    @contextlib.contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that is durable when the block is left without an error.

        Raises: RegistryUnavailableError, after which it is not known whether it was committed.
        """
        with self._named_errors(), Session(self._writer) as session, session.begin():
            yield session

    def lock(self, session: Session, *, is_exclusive: bool) -> None:
        """Waits for the log, until the end of the transaction; on SQLite every `write` has it to itself.

        Whoever waits is served in turn: holders of a shared lock that come one after another do not keep
        out one who wants it exclusively, as they would on a locked row.
        """
        if self.is_postgresql:
            function = "pg_advisory_xact_lock" + ("" if is_exclusive else "_shared")
            session.execute(text(f"SELECT {function}(:key)"), {"key": _LOG_LOCK})

    def notify(self, session: Session) -> None:
        """Wakes all listeners when the transaction commits; nothing on SQLite."""
        if self.is_postgresql:
            session.execute(text("SELECT pg_notify(:channel, '')"), {"channel": CHANNEL})

    @contextlib.asynccontextmanager
    async def listener(self) -> AsyncIterator[Listener]:
        """Waits for notifications on a connection of its own."""
        listener = Listener(_libpq_url(self._url, self._timeout_s) if self.is_postgresql else None)
        try:
            yield listener
        finally:
            await listener.close()

    def _prepare(self, connection: DBAPIConnection, record: object) -> None:
        if self.is_postgresql:
            _prepare_postgresql(connection, self._timeout_s)
        else:
            _prepare_sqlite(connection, self._timeout_s)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        # Those of a driver come as they are where a connection is prepared.
        except (SQLAlchemyError, psycopg.Error, sqlite3.Error) as error:
            # The text of a driver's error may quote what was being written.
            cause = getattr(error, "orig", None) or error
            raise RegistryUnavailableError(
                "The registry did not carry out a transaction; one that changes something may "
                "still have been committed",
                expected=f"an answer of {self._url.render_as_string(hide_password=True)}",
                got=type(cause).__name__,
                fix="Check the database and its disk, and repeat with the same idempotency key.",
            ) from error


class Listener:
    """Waits for notifications; without a database that sends any, or cut off from it, for time."""

    def __init__(self, url: str | None) -> None:
        self._url = url
        self._connection: psycopg.AsyncConnection[Any] | None = None

    async def connect(self) -> None:
        """Listens from here on, if it can. Called again it mends what has broken."""
        if self._url is None or self._connection is not None:
            return
        connection = None
        try:
            connection = await psycopg.AsyncConnection.connect(self._url, autocommit=True)
            await connection.execute(f"LISTEN {CHANNEL}")
        except psycopg.Error as error:
            logger.warning("No notifications of the registry: %s; polling", type(error).__name__)
            if connection is not None:
                await connection.close()
            return
        self._connection = connection

    async def wait(self, timeout_s: float) -> None:
        """Returns at a notification, or after `timeout_s`."""
        if self._connection is None:
            await asyncio.sleep(timeout_s)
            return
        try:
            async for _ in self._connection.notifies(timeout=timeout_s, stop_after=1):
                pass
        except psycopg.Error as error:
            logger.warning("No notifications of the registry: %s; polling", type(error).__name__)
            await self.close()
            await asyncio.sleep(timeout_s)

    async def close(self) -> None:
        """Closes the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()


def with_password(url: str, password: str) -> str:
    """A PostgreSQL URL with a password in it. Raises: ConfigError."""
    parsed = _parse(url)
    if parsed.get_backend_name() != "postgresql":
        raise ConfigError(
            "A password is given for a registry that takes none",
            expected="postgresql://user@host/database",
            got=parsed.drivername,
            fix="Remove the password file, or set the URL of a PostgreSQL database.",
        )
    if parsed.password is not None or not parsed.username:
        raise ConfigError(
            "The registry's URL does not go with a password file",
            expected="a user, and no password",
            got="no user" if not parsed.username else "a password in the URL too",
            fix="Write postgresql://user@host/database.",
        )
    return parsed.set(password=password).render_as_string(hide_password=False)


def _parse(text: str) -> URL:
    try:
        url = make_url(text)
    except ArgumentError:
        raise _bad_url("something else") from None
    backend = url.get_backend_name()
    if backend == "postgresql" and url.drivername in ("postgresql", "postgresql+psycopg"):
        return url.set(drivername="postgresql+psycopg")
    if url.drivername not in ("sqlite", "sqlite+pysqlite"):
        raise _bad_url(url.drivername)
    if url.database in (None, "", ":memory:"):
        raise _bad_url("an in-memory database, which forgets what it acknowledged")
    if url.query:
        raise _bad_url("options of SQLite, which could switch off its locks")
    return url


def _bad_url(got: str) -> ConfigError:
    return ConfigError(
        "The registry's database URL cannot be used",
        expected="sqlite:////absolute/path.db or postgresql://user@host/database",
        got=got,
        fix="Correct the URL.",
    )


def _libpq_url(url: URL, timeout_s: float) -> str:
    query = {"connect_timeout": str(max(2, round(timeout_s)))} | dict(url.query)
    return url.set(drivername="postgresql", query=query).render_as_string(hide_password=False)


def _upgrade(connection: Connection) -> None:
    try:
        upgrade(connection)
    except AlterError:
        raise
    except SQLAlchemyError as error:
        if isinstance(error, DBAPIError) and error.connection_invalidated:
            raise  # cut off: nothing is wrong with the schema
        raise RegistrySchemaError(
            "The registry's database cannot be brought to the schema of this version",
            expected="an empty database, or one that an older version of ALTER has made",
            got=type(getattr(error, "orig", None) or error).__name__,
            fix="Give the registry a database of its own; nothing was changed in this one.",
        ) from error


def _begin(connection: Connection) -> None:
    # A write that begins deferred could not upgrade its snapshot once another has written.
    is_write = connection.get_execution_options().get("is_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")


def _prepare_sqlite(connection: Any, timeout_s: float) -> None:
    connection.isolation_level = None  # transactions begin in _begin, not where the driver thinks
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {round(timeout_s * 1000)}")
    for pragma, wanted in (
        ("journal_mode = WAL", "wal"),
        ("synchronous = FULL", 2),
        ("foreign_keys = ON", 1),
    ):
        name = pragma.split()[0]
        cursor.execute(f"PRAGMA {pragma}")
        actual = cursor.execute(f"PRAGMA {name}").fetchone()[0]
        if actual != wanted:
            raise ConfigError(
                "SQLite cannot keep the registry durable at this place",
                expected=f"{name} {wanted}",
                got=repr(actual),
                fix="Put the file on a local disk, or use PostgreSQL.",
            )
    cursor.close()


def _prepare_postgresql(connection: Any, timeout_s: float) -> None:
    connection.autocommit = True
    timeout = f"{round(timeout_s * 1000)}ms"
    *_, fsync = connection.execute(_PREPARE_POSTGRESQL, [timeout] * 3).fetchone()
    connection.autocommit = False
    if fsync != "on":
        raise ConfigError(
            "This PostgreSQL server does not keep what it has committed",
            expected="fsync on",
            got=f"fsync {fsync}",
            fix="Set fsync = on in its configuration.",
        )
