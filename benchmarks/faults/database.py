"""The registry's database of one fleet, and what can be done to it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from tests.support import postgres

from .proxy import Proxy


class Place(Protocol):
    """Where a fleet keeps its registry."""

    kind: str

    @property
    def url(self) -> str:
        """For whoever is not cut off: the checks."""
        ...

    async def url_of(self, index: int) -> str:
        """For a server; its way there can be cut."""
        ...

    async def close(self) -> None:
        """Drops it."""
        ...


@dataclasses.dataclass
class SqlitePlace:
    """A file that all servers of one machine open."""

    path: Path
    kind: str = "sqlite"

    @property
    def url(self) -> str:
        """See `Place`."""
        return f"sqlite:///{self.path}"

    async def url_of(self, index: int) -> str:
        """See `Place`."""
        return self.url

    async def close(self) -> None:
        """See `Place`."""

    @contextlib.asynccontextmanager
    async def locked(self) -> AsyncIterator[None]:
        """Nobody can write. Raises: sqlite3.OperationalError if somebody does, for too long."""
        connection = await asyncio.to_thread(self._lock)
        try:
            yield
        finally:
            connection.rollback()
            connection.close()

    def _lock(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=1, check_same_thread=False)
        connection.execute("BEGIN IMMEDIATE")
        return connection


class PostgresPlace:
    """A database of a running PostgreSQL; each server reaches it through a proxy of its own."""

    kind = "postgresql"

    def __init__(self, socket: Path, name: str, folder: Path) -> None:
        self.socket = socket
        self._name = name
        self._folder = folder
        self.proxies: dict[int, Proxy] = {}

    async def create(self) -> None:
        """Makes the database; it finds our clock before PostgreSQL's own."""
        await asyncio.to_thread(
            postgres.execute,
            str(self.socket),
            f"CREATE DATABASE {self._name} TEMPLATE template0",
            f"ALTER DATABASE {self._name} SET search_path = public, pg_catalog",
        )

    @property
    def url(self) -> str:
        """See `Place`."""
        return self._url(self.socket)

    async def url_of(self, index: int) -> str:
        """See `Place`."""
        if index not in self.proxies:
            self.proxies[index] = Proxy(self._folder / str(index), self.socket)
            await self.proxies[index].open()
        return self._url(self.proxies[index].folder)

    async def close(self) -> None:
        """See `Place`."""
        for proxy in self.proxies.values():
            await proxy.close()
        await asyncio.to_thread(
            postgres.execute, str(self.socket), f"DROP DATABASE {self._name} WITH (FORCE)"
        )

    async def set_clock(self, offset_s: float) -> None:
        """Sets the database's clock ahead of the machine's."""
        await self._execute(
            "CREATE OR REPLACE FUNCTION public.clock_timestamp() RETURNS timestamptz LANGUAGE sql"
            " VOLATILE AS $$ SELECT pg_catalog.clock_timestamp()"
            f" + interval '{offset_s} seconds' $$"
        )

    async def notify(self, copies: int) -> None:
        """Notifies for nothing."""
        await self._execute(*["NOTIFY alter_registry"] * copies)

    async def _execute(self, *statements: str) -> None:
        await asyncio.to_thread(
            postgres.execute, str(self.socket), *statements, database=self._name
        )

    def _url(self, folder: Path) -> str:
        return f"postgresql://alter@/{self._name}?host={folder}"
