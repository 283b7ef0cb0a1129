"""`/health/live` and `/health/ready`, for orchestrators; open to everybody, and without names of domains.

vLLM's own `/health` and `/ping` say whether the engine works and can be trusted, as before.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from .runtime import AlterRuntime

LIVE = "/health/live"
READY = "/health/ready"
RETRY_AFTER_S = 5

router = APIRouter(tags=["health"])


@router.get(LIVE, summary="Whether the process is to be kept")
async def live(request: Request) -> JSONResponse:
    """503 only if nothing but a restart helps: the engine could not prove what it applies."""
    parts = _runtime(request).parts
    if parts is None or parts.service.is_trusted:
        return JSONResponse({"status": "live"})
    body = {"status": "untrusted", "reason": parts.service.status().distrust}
    return JSONResponse(body, status_code=HTTPStatus.SERVICE_UNAVAILABLE)


@router.get(READY, summary="Whether requests are to be sent here")
async def ready(request: Request) -> JSONResponse:
    """200 at the epoch to be applied, with a passed canary and a lease; else 503 and the reason."""
    parts = _runtime(request).parts
    body: dict[str, Any] = {"status": "starting", "reason": "the engine is not ready yet"}
    if parts is not None:
        reconciler = parts.reconciler
        if reconciler.is_ready:
            return JSONResponse({"status": "ready", "epoch": reconciler.applied})
        epochs = {"epoch": reconciler.applied, "head": reconciler.head}
        body = {"status": "not-ready", "reason": reconciler.reason, **epochs}
    return JSONResponse(
        body,
        status_code=HTTPStatus.SERVICE_UNAVAILABLE,
        headers={"Retry-After": str(RETRY_AFTER_S)},
    )


def _runtime(request: Request) -> AlterRuntime:
    runtime: AlterRuntime = request.app.state.alter
    return runtime
