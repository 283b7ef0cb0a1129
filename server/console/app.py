"""The console as an application, to be mounted beside `/admin`."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Scope

from alter_core.errors import AlterError, ConfigError
from server.api.body_limit import BodyLimit
from server.api.problems import ProblemError
from server.api.runtime import AlterRuntime

from . import fleet, requests, trace
from .history import RoutedTokenHistory
from .inside import inside_client
from .pages import STATIC, Page, page, problem_page, show_login, to_login, transport_of
from .session import SameOrigin, log_in

CONSOLE = "/console"
UPLOADS = "/requests/new"
_YEAR_S = 365 * 24 * 3600


def console_app(runtime: AlterRuntime) -> Starlette:
    """All pages below `/console`."""
    history = RoutedTokenHistory()
    app = Starlette(
        routes=[
            Mount("/static", _Assets(directory=STATIC)),
            Route("/login", _login, methods=["GET", "POST"]),
            Route("/logout", _logout, methods=["POST"]),
            _get("/", fleet.show_fleet),
            _get("/domains", fleet.show_domains(history)),
            _get("/domains/activate", fleet.ask_to_activate),
            _post("/domains/activate", fleet.activate),
            _get("/domains/{name}/revoke", fleet.ask_to_revoke),
            _post("/domains/{name}/revoke", fleet.revoke),
            _get("/operations/{id}", fleet.show_operation),
            _get("/requests", requests.show_requests),
            _get(UPLOADS, requests.new_request),
            _post(UPLOADS, requests.create_request),
            _get("/requests/{id}", requests.show_request),
            _get("/requests/{id}/approve", requests.ask_to("approve")),
            _post("/requests/{id}/approve", requests.decide_to("approve")),
            _get("/requests/{id}/cancel", requests.ask_to("cancel")),
            _post("/requests/{id}/cancel", requests.decide_to("cancel")),
            _get("/requests/{id}/certificate", requests.show_certificate),
            _get("/requests/{id}/evidence.json", requests.download_evidence),
            _get("/trace", trace.ask_for_trace),
            _post("/trace", trace.show_trace),
        ],
        middleware=[
            Middleware(SameOrigin),
            Middleware(BodyLimit, runtime=runtime, uploads=UPLOADS, refuse=_refuse),
        ],
        exception_handlers={HTTPStatus.NOT_FOUND: _not_found},
    )
    app.state.alter = runtime
    return app


def _get(path: str, handler: Page) -> Route:
    return Route(path, page(handler), methods=["GET"])


def _post(path: str, handler: Page) -> Route:
    return Route(path, page(handler), methods=["POST"])


class _Assets(StaticFiles):
    """Their addresses change with their content, so browsers may keep them."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        """See Starlette."""
        response = super().file_response(*args, **kwargs)
        response.headers["Cache-Control"] = f"public, max-age={_YEAR_S}, immutable"
        return response


async def _login(request: Request) -> Response:
    if request.method != "POST":
        return show_login(request)
    token = str((await request.form()).get("token") or "").strip()
    transport = transport_of(request)
    try:
        if not (token and token.isascii() and token.isprintable()):
            raise ConfigError(
                "This cannot be a token",
                expected="printable ASCII characters",
                got="others, or none",
                fix="Paste it as `alter token create` has shown it.",
            )
        with inside_client(transport, token) as client:
            await asyncio.to_thread(client.whoami)
    except AlterError as error:
        return show_login(request, error, transport.status or HTTPStatus.UNPROCESSABLE_ENTITY)
    response = RedirectResponse(f"{request.scope['root_path']}/", HTTPStatus.SEE_OTHER)
    log_in(response, request, token)
    return response


async def _logout(request: Request) -> Response:
    return to_login(request)


def _refuse(error: ProblemError, scope: Scope) -> ASGIApp:
    problem = error.problem
    told = AlterError(problem.detail, expected=problem.expected, got=problem.got, fix=problem.fix)
    return problem_page(Request(scope), told, problem.status)


async def _not_found(request: Request, error: Exception) -> Response:
    problem = AlterError(
        "There is no such page", expected="a page that the menu leads to", got="another address"
    )
    return problem_page(request, problem, HTTPStatus.NOT_FOUND)
