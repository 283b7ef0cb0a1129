"""A bound on the bodies of `/admin` and `/console`, which are small; but for uploads."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .middleware import route_path
from .problems import ProblemError, problem_response
from .runtime import AlterRuntime

MAX_BODY_BYTES = 64 * 2**10
UPLOADS = "/unlearning-requests"

Refuse = Callable[[ProblemError, Scope], ASGIApp]


def _refuse(error: ProblemError, scope: Scope) -> ASGIApp:
    return problem_response(error.problem, scope["path"])


class BodyLimit:
    """Pure ASGI: reads the body, or refuses it as soon as it is too large; never holds more.

    `uploads`: the path of what may be larger. `refuse`: how a refusal is told.
    """

    def __init__(
        self,
        app: ASGIApp,
        runtime: AlterRuntime,
        uploads: str = UPLOADS,
        refuse: Refuse = _refuse,
    ) -> None:
        self._app = app
        self._refuse = refuse
        self._runtime = runtime
        self._uploads = uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_upload = scope["method"] == "POST" and route_path(scope) == self._uploads
        max_bytes = self._runtime.max_upload_bytes if is_upload else MAX_BODY_BYTES
        body, has_more = bytearray(), True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            has_more = message.get("more_body", False)
            if len(body) > max_bytes:
                refusal = self._refuse(_too_large(max_bytes, is_upload), scope)
                await refusal(scope, receive, send)
                return
        is_given = False

        async def replay() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, replay, send)


def _too_large(max_bytes: int, is_upload: bool) -> ProblemError:
    return ProblemError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "body-too-large",
        "The body is too large",
        "This upload is too large" if is_upload else "No such request needs such a body",
        expected=f"at most {max_bytes} bytes",
        got="more",
        fix="Name a file by `source`, cut it into several domains, or restart the server with a larger "
        "--alter-max-upload-mib."
        if is_upload
        else "Bundles are not uploaded: name the place where one lies.",
    )
