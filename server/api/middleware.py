"""The epoch on every answer, and the refusal to generate without trust or without a lease.

Pure ASGI, so that nothing is buffered. It stands inside vLLM's own middleware (authentication,
CORS, what `--middleware` adds), next to the routes: what it writes may still be compressed.
"""

from __future__ import annotations

import asyncio
import contextlib
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .closed_routes import CLOSED_ROUTES, closed
from .health import LIVE, READY, RETRY_AFTER_S
from .runtime import AlterRuntime
from .sse import EventStream, epoch_comment

EPOCH = "x-alter-epoch"
EPOCH_FINAL = "x-alter-epoch-final"

ALWAYS_OPEN = frozenset(
    (
        "/admin",
        "/console",
        "/docs",
        "/docs/oauth2-redirect",
        LIVE,
        READY,
        "/load",
        "/metrics",
        "/openapi.json",
        "/redoc",
        "/v1/models",
        "/version",
    )
)
"""Paths that generate nothing. Every other one is refused without trust or lease, known to us or not."""
ENGINE_HEALTH = frozenset(("/health", "/ping"))
"""vLLM's own: refused without trust, since only a restart helps then; not for want of a lease."""
ALWAYS_OPEN_PREFIXES = ("/admin/", "/console/", "/metrics/")

UNTRUSTED_RETRY_AFTER_S = 30
_WEBSOCKET_TRY_AGAIN_LATER = 1013


class CutError(Exception):
    """An answer was cut: it is not known which experts the engine applies, or whether they are enough.

    Leaves the application on purpose when the answer has begun: the connection is then closed
    without a proper end, so that no client takes the part for the whole.
    """


class EpochMiddleware:
    """See the module."""

    def __init__(self, app: ASGIApp, runtime: AlterRuntime) -> None:
        self._app = app
        self._runtime = runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = route_path(scope)
        if path in CLOSED_ROUTES:
            await closed()(scope, receive, send)
            return
        if path.startswith("/metrics") and self._runtime.parts is not None:
            await self._runtime.parts.observe()
        if path in ENGINE_HEALTH and self._runtime.is_sound:
            await self._app(scope, receive, _Answer(self._runtime, send).forward)
        elif not is_always_open(path):
            await self._generate(scope, receive, send)
        elif path.startswith("/v1/"):
            await self._app(scope, receive, _Answer(self._runtime, send).forward)
        else:
            await self._app(scope, receive, send)

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = _Answer(self._runtime, send)
        if await self._passes(scope, receive, answer):
            return
        if answer.has_begun:
            raise CutError("an answer was cut: generation is not allowed any more")
        await refusal(self._runtime)(scope, receive, answer.forward)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        if await self._passes(scope, receive, _Answer(self._runtime, send)):
            return
        # The peer may have closed already.
        with contextlib.suppress(RuntimeError):
            await send({"type": "websocket.close", "code": _WEBSOCKET_TRY_AGAIN_LATER})

    async def _passes(self, scope: Scope, receive: Receive, answer: _Answer) -> bool:
        """Runs the application. False if it was not allowed to begin, or to go on to its end."""
        is_allowed = await self._run(scope, receive, answer)
        if not is_allowed and self._runtime.parts is not None:
            self._runtime.parts.metrics.count_denial("cut" if answer.has_begun else "refused")
        return is_allowed

    async def _run(self, scope: Scope, receive: Receive, answer: _Answer) -> bool:
        if not self._runtime.is_serving:
            self._runtime.check_trust()
            return False
        passage = self._runtime.enter()
        is_refused = False
        try:
            await self._app(scope, receive, answer.send)
        except asyncio.CancelledError:
            if not passage.absorb():
                raise
            return False
        except CutError:
            self._runtime.check_trust()
            is_refused = True
        finally:
            self._runtime.leave(passage)
        # An application may swallow the cancellation; the task must not stay marked.
        return not (passage.absorb() or is_refused)


class _Answer:
    """One answer on its way out. Its epoch is the one in which its request began."""

    def __init__(self, runtime: AlterRuntime, send: Send) -> None:
        self._runtime = runtime
        self._send = send
        self._begun = runtime.epoch
        self._announced = runtime.epoch
        self._events: EventStream | None = None
        self.has_begun = False

    async def send(self, message: Message) -> None:
        """Sends on, unless generation is not allowed any more. Raises: CutError."""
        if not self._runtime.is_serving:
            raise CutError
        await self.forward(message)

    async def forward(self, message: Message) -> None:
        """Sends on, with the epoch."""
        if message["type"] in ("http.response.start", "websocket.accept"):
            self.has_begun = True
            self._begin(message)
        elif message["type"] == "http.response.body" and self._events is not None:
            message = self._annotated(message, self._events)
        await self._send(message)

    def _begin(self, message: Message) -> None:
        if self._begun is None:
            return
        message.setdefault("headers", [])
        headers = MutableHeaders(scope=message)
        headers[EPOCH] = str(self._begun)
        if _is_open_event_stream(headers):
            self._events = EventStream()
        elif self._runtime.epoch != self._begun:
            headers[EPOCH_FINAL] = str(self._runtime.epoch)

    def _annotated(self, message: Message, events: EventStream) -> Message:
        chunk: bytes = message.get("body", b"")
        epoch = self._runtime.epoch
        if not chunk or epoch is None or self._announced is None or epoch == self._announced:
            events.passed(chunk)
            return message
        body, is_placed = events.insert(chunk, epoch_comment(self._announced, epoch))
        if is_placed:
            self._announced = epoch
        return {**message, "body": body}


def is_always_open(path: str) -> bool:
    """True for what may be answered although nothing may be generated."""
    return path in ALWAYS_OPEN or path.startswith(ALWAYS_OPEN_PREFIXES)


def route_path(scope: Scope) -> str:
    """The path as the router matches it: without the root path, if that is a whole prefix."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root) and path[len(root) : len(root) + 1] in ("", "/"):
        return path[len(root) :]
    return path


def refusal(runtime: AlterRuntime) -> JSONResponse:
    """503 in the shape of OpenAI's errors."""
    if runtime.is_sound:
        why, retry_after_s = "that it applies every domain to be forgotten", RETRY_AFTER_S
    else:
        why, retry_after_s = "which forget experts it applies", UNTRUSTED_RETRY_AFTER_S
    message = (
        f"The server cannot prove {why}, so it generates nothing. "
        "The operator finds the reason at /admin/status."
    )
    error = {
        "message": message,
        "type": "ServiceUnavailableError",
        "param": None,
        "code": int(HTTPStatus.SERVICE_UNAVAILABLE),
    }
    return JSONResponse(
        {"error": error},
        status_code=HTTPStatus.SERVICE_UNAVAILABLE,
        headers={"Retry-After": str(retry_after_s)},
    )


def _is_open_event_stream(headers: Headers) -> bool:
    """An event stream that may still grow: of no announced length, and not compressed."""
    return (
        headers.get("content-type", "").startswith("text/event-stream")
        and "content-length" not in headers
        and "content-encoding" not in headers
    )
