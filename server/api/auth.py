"""Bearer authentication of `/admin`. vLLM's `--api-key` does not cover it."""

from __future__ import annotations

import hmac
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.settings import token_digest

from .problems import ProblemError, problem_response
from .runtime import AlterRuntime

_REALM = 'Bearer realm="alter-admin"'
_HOW_TO_SET = (
    "Start the server with ALTER_ADMIN_TOKEN, ALTER_ADMIN_TOKEN_FILE or --alter-admin-token-file; "
    "make a token with: openssl rand -hex 32"
)


class BearerAuth:
    """Pure ASGI: lets nothing through without the admin token, whatever the route."""

    def __init__(self, app: ASGIApp, runtime: AlterRuntime) -> None:
        self._app = app
        self._runtime = runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "no websocket routes under /admin"
        try:
            authenticate(Headers(scope=scope), self._runtime.admin_token_sha256)
        except ProblemError as error:
            response = problem_response(error.problem, scope["path"], error.headers)
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send)


def authenticate(headers: Headers, token_sha256: bytes | None) -> None:
    """Raises: ProblemError 403 if no token is configured, 401 if it is missing or wrong."""
    if token_sha256 is None:
        raise ProblemError(
            HTTPStatus.FORBIDDEN,
            "admin-closed",
            "The admin side is closed",
            "This server was started without an admin token, so nobody may use /admin",
            expected="an admin token in the server's configuration",
            got="none",
            fix=_HOW_TO_SET,
        )
    values = headers.getlist("authorization")
    scheme, _, presented = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    if scheme.lower() != "bearer" or not presented:
        raise _unauthorized("no bearer token", _REALM)
    if not hmac.compare_digest(token_digest(presented.strip()), token_sha256):
        raise _unauthorized("another token", f'{_REALM}, error="invalid_token"')


def _unauthorized(got: str, challenge: str) -> ProblemError:
    return ProblemError(
        HTTPStatus.UNAUTHORIZED,
        "unauthorized",
        "The admin token is missing or wrong",
        "This route needs the admin token",
        expected="Authorization: Bearer with the token that the server was started with",
        got=got,
        fix="Send the token; the command line takes it from ALTER_ADMIN_TOKEN or --token-file.",
        headers={"WWW-Authenticate": challenge},
    )
