"""One visit of somebody who is logged in, and how pages are made of templates."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from alter_core.errors import AlterError
from server.api.models import Whoami
from server.api.request_ids import request_id_of
from server.api.runtime import AlterRuntime
from server.client import AdminClient
from server.evidence.certificate import figure

from .inside import InsideTransport, inside_client
from .session import log_out, token_of

P = ParamSpec("P")
T = TypeVar("T")

STATIC = Path(__file__).parent / "static"

STOP_POLLING = 286
"""htmx shows the answer and asks no more."""


@dataclasses.dataclass(frozen=True)
class Visit:
    """One request for a page."""

    request: Request
    runtime: AlterRuntime
    client: AdminClient
    transport: InsideTransport
    """Of `client`."""
    who: Whoami

    @property
    def root(self) -> str:
        """Where the console is mounted."""
        return str(self.request.scope["root_path"])

    async def ask(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The answer of a method of `client`. Raises: AlterError."""
        return await asyncio.to_thread(method, *args, **kwargs)

    def show(
        self, template: str, *, status_code: int = HTTPStatus.OK, ends: bool = False, **values: Any
    ) -> Response:
        """The page, or for a poll its block `live`; nothing if that has not changed.

        `ends`: nothing more will change.
        """
        page = _environment().get_template(template)
        values |= {"root": self.root, "who": self.who, "path": self.request.url.path, "ends": ends}
        live = page.blocks.get("live")
        block = "" if live is None else "".join(live(page.new_context(values)))
        seen = hashlib.sha256(block.encode()).hexdigest()[:16]
        if not is_poll(self.request):
            return HTMLResponse(page.render(values, seen=seen), status_code=status_code)
        if ends:
            return HTMLResponse(block, status_code=STOP_POLLING)
        if self.request.query_params.get("seen") == seen:
            return Response(status_code=HTTPStatus.NO_CONTENT)
        return HTMLResponse(block + f'<input type="hidden" name="seen" value="{seen}">')

    def go(self, path: str) -> Response:
        """To another page, after a form."""
        return RedirectResponse(self.root + path, status_code=HTTPStatus.SEE_OTHER)


Page = Callable[[Visit], Awaitable[Response]]


def page(handler: Page) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that asks for a login first, and shows problems of `/admin` as they are."""

    @functools.wraps(handler)
    async def endpoint(request: Request) -> Response:
        token = token_of(request)
        if token is None:
            return to_login(request)
        transport = transport_of(request)
        with inside_client(transport, token) as client:
            try:
                who = await asyncio.to_thread(client.whoami)
                runtime = request.app.state.alter
                return await handler(Visit(request, runtime, client, transport, who))
            except AlterError as error:
                if transport.status == HTTPStatus.UNAUTHORIZED:
                    return to_login(request)
                return problem_page(request, error, transport.status)

    return endpoint


def is_poll(request: Request) -> bool:
    """True if only the part of the page that changes is wanted."""
    return "hx-request" in request.headers


def transport_of(request: Request) -> InsideTransport:
    """The way to `/admin` for whoever sent a request."""
    runtime: AlterRuntime = request.app.state.alter
    assert runtime.own_port_app is not None
    client = request.client
    return InsideTransport(
        runtime.own_port_app,
        asyncio.get_running_loop(),
        client=("", 0) if client is None else (client.host, client.port),
        request_id=request_id_of(request.scope),
    )


def to_login(request: Request) -> Response:
    """Also forgets a token that holds no longer."""
    place = request.scope["root_path"] + "/login"
    if is_poll(request):
        response = Response(headers={"HX-Redirect": place})
    else:
        response = RedirectResponse(place, status_code=HTTPStatus.SEE_OTHER)
    log_out(response, request)
    return response


def problem_page(request: Request, error: AlterError, status: int | None) -> Response:
    """What `/admin`, or a form, says is wrong."""
    template = _environment().get_template("problem.html.jinja")
    values = {"root": request.scope["root_path"], "who": None, "path": "", "problem": error}
    if is_poll(request):
        return HTMLResponse("".join(template.blocks["live"](template.new_context(values))))
    return HTMLResponse(template.render(values), status_code=problem_status(status))


def problem_status(status: int | None) -> int:
    """Of a page that tells a problem; `status`: of the latest answer of `/admin`, which may be fine."""
    if status is None or status < HTTPStatus.BAD_REQUEST:
        return HTTPStatus.UNPROCESSABLE_ENTITY
    return status


def show_login(
    request: Request, error: AlterError | None = None, status: int = HTTPStatus.OK
) -> Response:
    """The page that asks for a token."""
    values = {"root": request.scope["root_path"], "who": None, "path": "", "problem": error}
    text = _environment().get_template("login.html.jinja").render(values)
    return HTMLResponse(text, status_code=status)


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("server.console", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"moment": _moment, "figure": figure, "short": _short, "badge": _badge}
    environment.globals["asset"] = _asset
    return environment


@functools.cache
def _asset(name: str) -> str:
    """Its place below the console, which changes with its content."""
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]
    return f"/static/{name}?{digest}"


def _moment(time: datetime | None) -> Markup:
    if time is None:
        return Markup("—")
    utc = time.astimezone(UTC)
    return Markup('<time datetime="{}">{}</time>').format(
        utc.isoformat(timespec="seconds"), utc.strftime("%Y-%m-%d %H:%M:%S UTC")
    )


def _badge(state: str) -> Markup:
    return Markup('<span class="badge {0}">{1}</span>').format(state, state.replace("-", " "))


def _short(digest: str | None) -> Markup:
    if digest is None:
        return Markup("—")
    return Markup('<code title="{}">{}</code>').format(digest, digest[:19])
