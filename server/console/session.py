"""Who is logged in, and that what changes something comes from our own pages.

The cookie holds the token itself: it is looked at anew for every page, so a token that has expired or was
revoked is out at once, on every server. Scripts cannot read it, and other sites cannot have it sent.
"""

from __future__ import annotations

import base64
import binascii
from http import HTTPStatus
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE = "alter-console"

_READING = frozenset(("GET", "HEAD"))
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def token_of(request: Request) -> str | None:
    """The token that the cookie holds."""
    value = request.cookies.get(COOKIE)
    if value is None:
        return None
    try:
        return base64.urlsafe_b64decode(value.encode()).decode() or None
    except (binascii.Error, ValueError):
        return None


def log_in(response: Response, request: Request, token: str) -> None:
    """Until the browser is closed, or `log_out`."""
    response.set_cookie(
        COOKIE,
        base64.urlsafe_b64encode(token.encode()).decode(),
        path=request.scope["root_path"] or "/",
        secure=request.url.scheme == "https",
        httponly=True,
        samesite="strict",
    )


def log_out(response: Response, request: Request) -> None:
    """Forgets the token."""
    response.delete_cookie(COOKIE, path=request.scope["root_path"] or "/")


class SameOrigin:
    """Pure ASGI: refuses what changes something unless a browser says that one of our pages asked for it,
    and says on every page what it may load."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def forward(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        is_ours = scope["method"] in _READING or _is_same_origin(Headers(scope=scope))
        answer: ASGIApp = self._app if is_ours else _refusal()
        await answer(scope, receive, forward)


def _is_same_origin(headers: Headers) -> bool:
    site = headers.get("sec-fetch-site")
    if site is not None:
        return site == "same-origin"
    # Browsers leave it out where there is neither TLS nor loopback.
    origin = headers.get("origin")
    return origin is not None and urlsplit(origin).netloc == headers.get("host")


def _refusal() -> Response:
    return PlainTextResponse(
        "This form was not sent by a page of this console. Scripts use /admin.",
        status_code=HTTPStatus.FORBIDDEN,
    )
