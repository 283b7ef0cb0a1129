"""Both kinds of database for every test, with a clock that a test can move."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event

from server.registry import ChangeRequest, Deployment, Heartbeat, Registry
from tests.support import postgres

DEPLOYMENT = Deployment(base_model_fingerprint="f" * 64, substrate_digest="sha256:" + "5" * 64)
MAX_DOMAINS = 3
LEASE_S, MARGIN_S = 10.0, 2.0

_numbers = itertools.count()


def digest(number: int) -> str:
    """A digest like a bundle's."""
    return f"sha256:{number:064x}"


def activation(domain: str = "authors", number: int = 1, **fields: Any) -> ChangeRequest:
    """A request for a bundle's activation."""
    return ChangeRequest(
        action="activate", domain=domain, bundle_digest=digest(number), actor="ann", **fields
    )


def revocation(domain: str = "authors", **fields: Any) -> ChangeRequest:
    """A request for a revocation."""
    return ChangeRequest(action="revoke", domain=domain, actor="ann", **fields)


def beat(replica_id: str = "r1", applied_epoch: int = 0, state: Any = "serving") -> Heartbeat:
    """A heartbeat."""
    return Heartbeat(replica_id=replica_id, applied_epoch=applied_epoch, state=state)


@dataclasses.dataclass
class Place:
    """One empty database. `advance` moves its clock, which is not that of this process."""

    url: str
    advance: Callable[[float], None]
    stack: contextlib.ExitStack

    @property
    def is_postgresql(self) -> bool:
        return self.url.startswith("postgresql")

    def open(
        self,
        deployment: Deployment = DEPLOYMENT,
        *,
        kind: type[Registry] = Registry,
        **options: Any,
    ) -> Registry:
        """A registry as another server would open it."""
        settings = {"max_domains": MAX_DOMAINS, "lease_s": LEASE_S, "clock_margin_s": MARGIN_S}
        registry = kind.open(self.url, deployment, **(settings | options))
        self.stack.callback(registry.close)
        return registry


@pytest.fixture(scope="session")
def postgres_socket() -> Iterator[str]:
    with postgres.running() as socket:
        yield socket


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """An empty database of each kind."""
    with contextlib.ExitStack() as stack:
        if request.param == "sqlite":
            yield sqlite_place(tmp_path / "registry.db", stack)
        else:
            yield postgres_place(request.getfixturevalue("postgres_socket"), stack)


@pytest.fixture
def postgresql(postgres_socket: str) -> Iterator[Place]:
    """An empty database of PostgreSQL, for what SQLite does not have."""
    with contextlib.ExitStack() as stack:
        yield postgres_place(postgres_socket, stack)


@pytest.fixture
def registry(place: Place) -> Registry:
    """Opened on an empty database."""
    return place.open()


def sqlite_place(path: Path, stack: contextlib.ExitStack) -> Place:
    """A file whose connections take `strftime` from us."""
    offset = [0.0]
    plain = stack.enter_context(
        contextlib.closing(sqlite3.connect(":memory:", check_same_thread=False))
    )

    def strftime(form: str, when: str) -> str:
        query = "SELECT strftime(?, ?, ?)"
        return str(plain.execute(query, (form, when, f"{offset[0]} seconds")).fetchone()[0])

    def install(connection: Any, record: object) -> None:
        if connection.execute("PRAGMA database_list").fetchone()[2] == str(path):
            connection.create_function("strftime", 2, strftime)

    event.listen(Engine, "connect", install)
    stack.callback(event.remove, Engine, "connect", install)

    def advance(seconds: float) -> None:
        offset[0] += seconds

    return Place(url=f"sqlite:///{path}", advance=advance, stack=stack)


def postgres_place(socket: str, stack: contextlib.ExitStack) -> Place:
    """A database that finds our `clock_timestamp` before its own."""
    name = f"registry_{next(_numbers)}"
    postgres.execute(
        socket,
        f"CREATE DATABASE {name} TEMPLATE template0",
        f"ALTER DATABASE {name} SET search_path = public, pg_catalog",
    )
    stack.callback(postgres.execute, socket, f"DROP DATABASE {name} WITH (FORCE)")
    offset = [0.0]

    def advance(seconds: float) -> None:
        offset[0] += seconds
        postgres.execute(
            socket,
            "CREATE OR REPLACE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql"
            " VOLATILE AS $$ SELECT pg_catalog.clock_timestamp()"
            f" + interval '{offset[0]} seconds' $$",
            database=name,
        )

    return Place(url=f"postgresql://alter@/{name}?host={socket}", advance=advance, stack=stack)
