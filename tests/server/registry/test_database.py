"""Durability of the connections, and how a database gets its schema."""

from __future__ import annotations

import multiprocessing
import sqlite3
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text

from alter_core.errors import (
    ConfigError,
    EpochConflictError,
    RegistryError,
    RegistrySchemaError,
    RegistryUnavailableError,
)
from server.registry import Registry
from server.registry import database as database_module
from server.registry.database import Database
from server.registry.migrations import VERSION_TABLE
from server.registry.schema import Base
from tests.support import postgres

from .conftest import DEPLOYMENT, MAX_DOMAINS, Place, activation, sqlite_place


def database_of(place: Place) -> Database:
    database = Database(place.url)
    place.stack.callback(database.close)
    return database


def test_every_sqlite_connection_syncs_fully_and_keeps_foreign_keys(tmp_path: Path) -> None:
    with ExitStack() as stack:
        database = database_of(sqlite_place(tmp_path / "registry.db", stack))
        connections = [stack.enter_context(database.engine.connect()) for _ in range(3)]
        assert len({id(c.connection.driver_connection) for c in connections}) == 3
        for connection in connections:
            pragmas = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
                for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
            }
            assert pragmas == {
                "journal_mode": "wal",
                "synchronous": 2,
                "foreign_keys": 1,
                "busy_timeout": 5000,
            }


def test_a_write_on_sqlite_takes_its_lock_at_once_and_a_read_none(tmp_path: Path) -> None:
    with ExitStack() as stack:
        place = sqlite_place(tmp_path / "registry.db", stack)
        first, second = database_of(place), Database(place.url, timeout_s=0.05)
        stack.callback(second.close)
        with first.write() as writing, second.read() as session:
            writing.execute(text("SELECT 1"))
            assert session.scalar(text("SELECT 1")) == 1
            with pytest.raises(RegistryError), second.write() as late:
                late.execute(text("SELECT 1"))


def test_postgresql_waits_for_its_disk_whatever_the_database_is_set_to(
    postgres_socket: str, postgresql: Place
) -> None:
    name = postgresql.url.split("/")[3].split("?")[0]
    for given, kept in (("off", "on"), ("local", "on"), ("remote_apply", "remote_apply")):
        postgres.execute(postgres_socket, f"ALTER DATABASE {name} SET synchronous_commit = {given}")
        with database_of(postgresql).read() as session:
            assert session.scalar(text("SHOW synchronous_commit")) == kept
            assert session.scalar(text("SHOW transaction_isolation")) == "read committed"


def test_postgresql_that_does_not_sync_is_refused(postgres_socket: str, postgresql: Place) -> None:
    postgres.execute(
        postgres_socket, "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf(), pg_sleep(0.5)"
    )
    try:
        with pytest.raises(ConfigError, match="fsync"):
            postgresql.open()
    finally:
        postgres.execute(
            postgres_socket, "ALTER SYSTEM RESET fsync", "SELECT pg_reload_conf(), pg_sleep(0.5)"
        )
    postgresql.open()


@pytest.mark.parametrize(
    "url",
    [
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory&uri=true",
        "mysql://host/x",
        "postgresql+asyncpg://host/x",
        "registry.db",
        "",
    ],
)
def test_a_database_that_could_not_keep_its_word_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        Registry.open(url, DEPLOYMENT, max_domains=MAX_DOMAINS)


def test_a_database_that_is_not_there_is_reported_without_its_password(tmp_path: Path) -> None:
    for url in (
        "postgresql://ann:secret@127.0.0.1:1/registry",
        f"sqlite:///{tmp_path}/none/registry.db",
    ):
        with pytest.raises(RegistryError) as failure:
            Registry.open(url, DEPLOYMENT, max_domains=MAX_DOMAINS, timeout_s=1.0)
        assert "secret" not in str(failure.value)


@pytest.mark.parametrize("error", [psycopg.OperationalError, sqlite3.OperationalError])
def test_a_connection_that_breaks_while_it_is_prepared_is_reported_as_the_registrys(
    error: type[Exception], place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = place.open()
    registry._database.engine.dispose()

    def breaks(*_: object) -> None:
        raise error("server closed the connection unexpectedly")

    for prepare in ("_prepare_sqlite", "_prepare_postgresql"):
        monkeypatch.setattr(database_module, prepare, breaks)
    with pytest.raises(RegistryUnavailableError, match="did not carry out"):
        registry.head()


def test_the_migrations_make_the_schema(place: Place) -> None:
    place.open()
    with database_of(place).engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"version_table": VERSION_TABLE, "compare_type": True}
        )
        assert compare_metadata(context, Base.metadata) == []


def test_a_server_too_busy_to_migrate_at_once_is_not_cut_off(
    postgresql: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(connection: Connection) -> None:
        connection.execute(text("SELECT 1"))
        time.sleep(0.4)
        upgrade(connection)

    upgrade = database_module.upgrade
    monkeypatch.setattr(database_module, "upgrade", slowly)
    assert postgresql.open(timeout_s=0.2).head() == 0


def test_a_migration_that_is_cut_off_is_no_fault_of_the_schema(
    postgresql: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(connection: Connection) -> None:
        connection.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    monkeypatch.setattr(database_module, "upgrade", cut_off)
    with pytest.raises(RegistryUnavailableError):
        postgresql.open()


def test_a_database_of_a_newer_version_is_refused_and_left_alone(place: Place) -> None:
    place.open().append(activation())
    with database_of(place).write() as session:
        session.execute(text(f"UPDATE {VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(RegistrySchemaError, match="9999"):
        place.open()
    with database_of(place).read() as session:
        assert session.scalar(text(f"SELECT version_num FROM {VERSION_TABLE}")) == "9999"
        assert session.scalar(text("SELECT count(*) FROM changes")) == 1


def test_a_database_of_something_else_is_refused_and_left_alone(place: Place) -> None:
    with database_of(place).write() as session:
        session.execute(text("CREATE TABLE replicas (x INTEGER)"))
    with pytest.raises(RegistrySchemaError, match="database of its own"):
        place.open()
    with database_of(place).engine.connect() as connection:
        assert set(connection.dialect.get_table_names(connection)) == {"replicas"}


def test_the_log_refuses_what_no_change_can_be(place: Place) -> None:
    place.open().append(activation())
    for assignment in ("action = 'revoke'", "slot = -1", "in_flight = 'x'", "epoch = 0"):
        with pytest.raises(RegistryError), database_of(place).write() as session:
            session.execute(text(f"UPDATE changes SET {assignment}"))
    with pytest.raises(RegistryError), database_of(place).write() as session:
        session.execute(
            text("INSERT INTO idempotency_keys VALUES ('k', 'd', 'no-such-operation', :time)"),
            {"time": "2026-01-01 00:00:00.000000"},
        )


def test_processes_that_start_at_once_share_one_log(place: Place) -> None:
    num_processes, num_appends = 3, 12
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_processes, mp_context=context) as pool:
        epochs = list(
            pool.map(_start_and_append, [place.url] * num_processes, range(num_processes))
        )
    assert sorted(chain.from_iterable(epochs)) == list(range(1, num_processes * num_appends + 1))
    assert place.open().head() == num_processes * num_appends


def _start_and_append(url: str, index: int) -> list[int]:
    registry = Registry.open(url, DEPLOYMENT, max_domains=MAX_DOMAINS, timeout_s=60.0)
    epochs: list[int] = []
    while len(epochs) < 12:
        request = activation(f"d{index}", 100 * index + len(epochs))
        try:
            appended = registry.append(request, expected_epoch=registry.head())
        except EpochConflictError:
            continue
        epochs.append(appended.change.epoch)
    registry.close()
    return epochs
