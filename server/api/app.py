"""Puts the admin side and the epoch on vLLM's application."""

from __future__ import annotations

import contextlib
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from server.console.app import CONSOLE, console_app

from .attempts import AttemptMiddleware
from .auth import BearerAuth, FailureLimit, RoleGuard
from .body_limit import BodyLimit
from .closed_routes import closed
from .health import router as health_router
from .middleware import EpochMiddleware
from .problems import add_problem_handlers
from .request_ids import RequestIdMiddleware
from .request_routes import router as request_router
from .routes import router
from .runtime import AlterRuntime

ADMIN = "/admin"


def attach(app: FastAPI) -> AlterRuntime:
    """Adds everything to `app` and returns what its requests look at, `app.state.alter`.

    The admin side is an application of its own: vLLM's exception handlers, set after ours and for
    the OpenAI shape, do not reach into it.
    """
    runtime = AlterRuntime()
    app.state.alter = runtime
    admin = admin_app(runtime)
    guards = [
        Middleware(_WholePath),
        Middleware(BearerAuth, runtime=runtime, failures=FailureLimit()),
        Middleware(AttemptMiddleware, runtime=runtime),
        Middleware(RoleGuard),
        Middleware(BodyLimit, runtime=runtime),
    ]
    elsewhere = Middleware(_OnServingPort, runtime=runtime)
    app.router.routes.append(_WholeMount(ADMIN, app=admin, middleware=[elsewhere, *guards]))
    console = console_app(runtime)
    app.router.routes += [
        Route(CONSOLE, _to_console, include_in_schema=False),
        _WholeMount(CONSOLE, app=console, middleware=[elsewhere]),
    ]
    runtime.own_port_app = RequestIdMiddleware(_own_port_app(admin, guards, console), runtime)
    app.include_router(health_router)
    app.add_middleware(EpochMiddleware, runtime=runtime)
    _identify_requests(app, runtime)
    _close_at_the_end(app, runtime)
    _join_openapi(app, admin, runtime)
    return runtime


def admin_app(runtime: AlterRuntime) -> FastAPI:
    """The application under `/admin`, without its authentication."""
    admin = FastAPI(
        title="ALTER admin", openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    admin.state.alter = runtime
    admin.include_router(router)
    admin.include_router(request_router)
    add_problem_handlers(admin)
    return admin


def _identify_requests(app: FastAPI, runtime: AlterRuntime) -> None:
    """Puts the ids outside of all middleware, of that too which vLLM adds later."""
    build = app.build_middleware_stack

    def built() -> ASGIApp:
        return RequestIdMiddleware(build(), runtime)

    app.build_middleware_stack = built  # type: ignore[method-assign]


def _close_at_the_end(app: FastAPI, runtime: AlterRuntime) -> None:
    begin = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(application: FastAPI) -> AsyncIterator[Any]:
        async with begin(application) as state:
            try:
                yield state
            finally:
                await runtime.close()

    app.router.lifespan_context = lifespan


def _own_port_app(admin: FastAPI, guards: list[Middleware], console: ASGIApp) -> Starlette:
    """What listens on a port of its own: `/admin`, the description of it, and the console."""

    async def describe(request: Request) -> JSONResponse:
        description = admin.openapi()
        paths = {ADMIN + path: item for path, item in description["paths"].items()}
        return JSONResponse(description | {"paths": paths})

    return Starlette(
        routes=[
            Route("/openapi.json", describe),
            _WholeMount(ADMIN, app=admin, middleware=guards),
            Route(CONSOLE, _to_console),
            _WholeMount(CONSOLE, app=console),
        ]
    )


async def _to_console(request: Request) -> Response:
    return RedirectResponse(f"{request.scope['root_path']}{CONSOLE}/")


class _WholeMount(Mount):
    """All that begins with its path: Starlette's own leaves line breaks to what is outside."""

    def __init__(self, path: str, **options: Any) -> None:
        super().__init__(path, **options)
        self.path_regex = re.compile(self.path_regex.pattern, re.DOTALL)


class _OnServingPort:
    """Keeps `/admin` and `/console` off the port that serves once they have one of their own."""

    def __init__(self, app: ASGIApp, runtime: AlterRuntime) -> None:
        self._app = app
        self._runtime = runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = closed() if self._runtime.has_own_port else self._app
        await answer(scope, receive, send)


class _WholePath:
    """Puts the root path back in front of the path where a proxy has taken it off.

    `--root-path` is for such proxies; below a mount, Starlette's router finds nothing without it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, root = scope["path"], scope.get("app_root_path", "")
        if not path.startswith(scope.get("root_path", "") + "/"):
            scope = {**scope, "path": root.rstrip("/") + path}
        await self._app(scope, receive, send)


def _join_openapi(app: FastAPI, admin: FastAPI, runtime: AlterRuntime) -> None:
    """Lets `/openapi.json` of `app` describe the admin side too."""
    describe: Callable[[], dict[str, Any]] = app.openapi

    def joined() -> dict[str, Any]:
        if runtime.has_own_port:
            return describe()
        if app.openapi_schema is None:
            schema, ours = describe(), admin.openapi()
            schema["paths"] |= {ADMIN + path: item for path, item in ours["paths"].items()}
            components = schema.setdefault("components", {})
            for kind, entries in ours["components"].items():
                components[kind] = entries | components.get(kind, {})
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = joined  # type: ignore[method-assign]
