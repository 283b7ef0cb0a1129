"""One id for a request, wherever it is named: logs, the audit log, vLLM's own ids, answers of `/admin`.

Pure ASGI and outermost, so that what is refused on the way has one too. A client's own id is taken over if
it is a plain one; another one is replaced before anybody reads it.
"""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.logs import log_context

from .runtime import AlterRuntime

REQUEST_ID = "x-request-id"

_PLAIN = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_NAME = REQUEST_ID.encode()


class RequestIdMiddleware:
    """See the module. Below it every request has the header `x-request-id`, once."""

    def __init__(self, app: ASGIApp, runtime: AlterRuntime) -> None:
        self._app = app
        self._runtime = runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == _NAME]
        is_plain = len(given) == 1 and _PLAIN.fullmatch(given[0])
        request_id = given[0] if is_plain else str(uuid.uuid4())
        others = [(name, value) for name, value in scope["headers"] if name != _NAME]
        scope = {**scope, "headers": [*others, (_NAME, request_id.encode())]}
        with log_context(request_id=request_id, epoch=self._runtime.epoch):
            await self._app(scope, receive, send)


def request_id_of(scope: Scope) -> str:
    """The id of a request that came through the middleware."""
    return Headers(scope=scope)[REQUEST_ID]
