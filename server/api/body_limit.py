"""A bound on the bodies of `/admin`, which are small."""

from __future__ import annotations

from http import HTTPStatus

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import ProblemError, problem_response

MAX_BODY_BYTES = 64 * 2**10


class BodyLimit:
    """Pure ASGI: reads the body, or refuses it as soon as it is too large; never holds more."""

    def __init__(self, app: ASGIApp, max_bytes: int = MAX_BODY_BYTES) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body, has_more = bytearray(), True
        while has_more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            has_more = message.get("more_body", False)
            if len(body) > self._max_bytes:
                error = _too_large(self._max_bytes)
                await problem_response(error.problem, scope["path"])(scope, receive, send)
                return
        is_given = False

        async def replay() -> Message:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": bytes(body), "more_body": False}

        await self._app(scope, replay, send)


def _too_large(max_bytes: int) -> ProblemError:
    return ProblemError(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        "body-too-large",
        "The body is too large",
        "No request under /admin needs such a body",
        expected=f"at most {max_bytes} bytes",
        got="more",
        fix="Bundles are not uploaded: name the place where one lies.",
    )
