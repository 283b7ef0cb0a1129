"""Stands between one server and PostgreSQL: cuts, delays, holds, and loses or repeats notifications."""

from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

SOCKET = ".s.PGSQL.5432"
NOTIFICATION = b"A"
_CHUNK_BYTES = 65536


class Proxy:
    """Listens on a socket in `folder` and forwards to the one in `upstream`. `close()` it."""

    def __init__(self, folder: Path, upstream: Path) -> None:
        self.folder = folder
        self._upstream = upstream
        self._server: asyncio.AbstractServer | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self.is_cut = False
        self.delay_s = 0.0
        """Before each piece that the database sends."""
        self.notification_copies = 1
        """0 loses them."""
        self.num_notifications = 0
        """That were lost or repeated."""

    async def open(self) -> None:
        """Begins to listen."""
        self.folder.mkdir(parents=True, exist_ok=True)
        os.chmod(self.folder, 0o755)
        self._server = await asyncio.start_unix_server(
            self._accept, str(self.folder / SOCKET), backlog=64
        )

    async def close(self) -> None:
        """Ends every connection."""
        if self._server is not None:
            self._server.close()
        self.cut()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        """Ends all connections, and every new one at once, until `heal`."""
        self.is_cut = True
        for writer in tuple(self._writers):
            writer.transport.abort()

    def hold(self) -> None:
        """Forwards nothing until `heal`, and says nothing of it."""
        self._flows.clear()

    def heal(self) -> None:
        """Back to normal."""
        self.is_cut = False
        self.delay_s = 0.0
        self.notification_copies = 1
        self._flows.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        self._writers.add(writer)
        try:
            if self.is_cut:
                return
            await self._flows.wait()
            upstream = await asyncio.open_unix_connection(str(self._upstream / SOCKET))
            self._writers.add(upstream[1])
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._requests(reader, upstream[1]))
                    group.create_task(self._answers(upstream[0], writer))
            finally:
                self._writers.discard(upstream[1])
                upstream[1].transport.abort()
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            pass  # either side went away, or `close`
        finally:
            self._writers.discard(writer)
            writer.transport.abort()

    async def _requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(_CHUNK_BYTES):
            await self._flows.wait()
            writer.write(chunk)
            await writer.drain()
        raise ConnectionResetError

    async def _answers(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """By message: one byte for the kind, four for the length, the rest. The first answer of a
        negotiation is one byte, but nobody negotiates on a Unix socket."""
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = await reader.readexactly(5)
                body = await reader.readexactly(int.from_bytes(head[1:], "big") - 4)
                copies = 1
                if head[:1] == NOTIFICATION and self.notification_copies != 1:
                    copies = self.notification_copies
                    self.num_notifications += 1
                await self._flows.wait()
                if self.delay_s and head[:1] == b"Z":
                    await asyncio.sleep(self.delay_s)
                writer.write((head + body) * copies)
                await writer.drain()
        raise ConnectionResetError
