"""The typed client of `/admin`, over the application that it runs in."""

from __future__ import annotations

import asyncio

import httpx
from starlette.types import ASGIApp

from server.client import AdminClient

_URL = "http://console"


class InsideTransport(httpx.BaseTransport):
    """Hands requests of another thread to an application on the event loop, as if they came from `client`."""

    def __init__(
        self,
        app: ASGIApp,
        loop: asyncio.AbstractEventLoop,
        *,
        client: tuple[str, int],
        request_id: str,
    ) -> None:
        self._asgi = httpx.ASGITransport(app=app, client=client)
        self._loop = loop
        self._request_id = request_id
        self.status: int | None = None
        """Of the latest answer."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """See httpx. Not to be called on the event loop."""
        request.headers["X-Request-Id"] = self._request_id
        return asyncio.run_coroutine_threadsafe(self._ask(request), self._loop).result()

    async def _ask(self, request: httpx.Request) -> httpx.Response:
        answer = await self._asgi.handle_async_request(request)
        self.status = answer.status_code
        return httpx.Response(
            answer.status_code, headers=answer.headers, content=await answer.aread()
        )


def inside_client(transport: InsideTransport, token: str) -> AdminClient:
    """Its methods block: call them in a thread."""
    return AdminClient(_URL, token, transport=transport)
