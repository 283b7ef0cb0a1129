"""The routes of `/admin/unlearning-requests`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.responses import Response

from alter_core.errors import AlterError, RequestsClosedError
from server.evidence import render_certificate
from server.evidence.issue import issue
from server.requests.intake import Upload, read_source
from server.requests.records import UnlearningRequest as RequestRecord
from server.requests.service import RequestService

from .attempts import attempt_of
from .idempotency import REPLAYED, idempotency_of
from .problems import problem_of
from .request_models import (
    UnlearningRequest,
    UnlearningRequestBody,
    UnlearningRequestList,
)
from .routes import IdempotencyKey, Reason, allowed_place, header_reason, problems
from .routes import With as WithParts
from .runtime import AlterRuntime

KEEP_ALIVE_S = 15.0
PATH = "/unlearning-requests"


def get_requests(request: Request) -> RequestService:
    """Raises: RequestsClosedError while the server starts."""
    runtime: AlterRuntime = request.app.state.alter
    if runtime.requests is None:
        raise RequestsClosedError(
            "This server takes no unlearning requests yet",
            expected="a server that is ready",
            got="one that starts",
            fix="Try again in a few seconds.",
        )
    return runtime.requests


With = Annotated[RequestService, Depends(get_requests)]

router = APIRouter(
    tags=["unlearning requests"], dependencies=[Depends(HTTPBearer(auto_error=False))]
)


@router.post(
    PATH,
    summary="Ask for a domain to be forgotten",
    status_code=HTTPStatus.ACCEPTED,
    response_model=UnlearningRequest,
    responses=problems(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.CONFLICT,
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        HTTPStatus.UNPROCESSABLE_ENTITY,
        HTTPStatus.SERVICE_UNAVAILABLE,
    ),
)
async def create(
    body: UnlearningRequestBody,
    request: Request,
    requests: With,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Trains an expert out of rows and documents, measures it, and activates it in the whole fleet.

    What is uploaded lies on this server's disk until the request has ended, and nowhere else. Follow it at
    `Location`, or as events below that.
    """
    runtime: AlterRuntime = request.app.state.alter
    idempotency = await idempotency_of(request, idempotency_key)
    rows, documents = list(body.forget), [each.model_dump() for each in body.documents]
    if body.source is not None:
        more_rows, more_documents = await asyncio.to_thread(
            read_source, allowed_place(request, body.source), runtime.max_upload_bytes
        )
        rows, documents = rows + more_rows, documents + more_documents
    upload = Upload(
        domain=body.domain,
        forget=rows,
        documents=documents,
        retain=body.retain,
        approval=body.approval,
        deadline=body.deadline,
        reason=body.reason,
    )
    cause = attempt_of(request).hand_over(body.reason)
    created, is_replayed = await requests.create(upload, idempotency=idempotency, cause=cause)
    headers = {"Location": f"{request.scope['root_path']}{PATH}/{created.id}"}
    if is_replayed:
        headers[REPLAYED] = "true"
    return _json(created, status=HTTPStatus.ACCEPTED, headers=headers)


@router.get(
    PATH,
    summary="List unlearning requests",
    response_model=UnlearningRequestList,
    responses=problems(HTTPStatus.SERVICE_UNAVAILABLE),
)
async def list_requests(requests: With) -> Response:
    """Of all servers of the registry, the newest first."""
    found = [UnlearningRequest.of(each) for each in await requests.list()]
    return JSONResponse(UnlearningRequestList(requests=found).model_dump(mode="json"))


@router.get(
    f"{PATH}/{{id}}",
    summary="Show an unlearning request",
    response_model=UnlearningRequest,
    responses=problems(HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE),
)
async def show(id: str, requests: With) -> Response:
    """Its state, progress and figures."""
    return _json(await requests.get(id))


@router.get(
    f"{PATH}/{{id}}/events",
    summary="Follow an unlearning request",
    response_class=StreamingResponse,
    responses={
        HTTPStatus.OK: {
            "description": "Server-sent events: `request`, with an UnlearningRequest as data, now and at "
            "every change, until it has ended",
            "content": {"text/event-stream": {"schema": {"type": "string"}}},
        },
        **problems(HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE),
    },
)
async def events(id: str, requests: With) -> Response:
    """Its state, progress and figures as they change."""
    first = await requests.get(id)
    return StreamingResponse(
        _events(requests, first),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


@router.get(
    f"{PATH}/{{id}}/evidence",
    summary="Evidence of an unlearning request",
    response_class=JSONResponse,
    responses={
        HTTPStatus.OK: {
            "description": "A DSSE envelope; with `Accept: text/html` a page that has it inside",
            "content": {
                "application/json": {"schema": {"type": "object"}},
                "text/html": {"schema": {"type": "string"}},
            },
        },
        **problems(HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE),
    },
)
async def evidence(
    id: str,
    request: Request,
    requests: With,
    parts: WithParts,
    accept: Annotated[str, Header(description="`text/html`: a page for people")] = "",
) -> Response:
    """What was asked, what was measured, what applies, and who did it; signed if the server has a key."""
    envelope = await issue(id, parts, requests, request.app.state.alter.audit)
    headers = {"Cache-Control": "no-store"}
    if "text/html" in accept:
        return HTMLResponse(render_certificate(envelope), headers=headers)
    return JSONResponse(envelope, headers=headers)


@router.post(
    f"{PATH}/{{id}}/approve",
    summary="Answer the question of an unlearning request with yes",
    response_model=UnlearningRequest,
    responses=problems(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.CONFLICT,
        HTTPStatus.SERVICE_UNAVAILABLE,
    ),
)
async def approve(id: str, request: Request, requests: With, reason: Reason = None) -> Response:
    """Lets a request that awaits approval go on."""
    cause = attempt_of(request).hand_over(header_reason(reason))
    return _json(await requests.approve(id, cause))


@router.post(
    f"{PATH}/{{id}}/cancel",
    summary="Cancel an unlearning request",
    response_model=UnlearningRequest,
    responses=problems(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.CONFLICT,
        HTTPStatus.SERVICE_UNAVAILABLE,
    ),
)
async def cancel(id: str, request: Request, requests: With, reason: Reason = None) -> Response:
    """Ends it and deletes its text, unless its expert is being activated."""
    cause = attempt_of(request).hand_over(header_reason(reason))
    return _json(await requests.cancel(id, cause))


async def _events(requests: RequestService, first: RequestRecord) -> AsyncIterator[bytes]:
    watch = requests.watch(first.id)
    coming = asyncio.ensure_future(anext(watch, None))
    try:
        while True:
            done, _ = await asyncio.wait([coming], timeout=KEEP_ALIVE_S)
            if not done:
                yield b": still here\n\n"
                continue
            try:
                found = coming.result()
            except AlterError as error:
                yield _event("problem", problem_of(error).model_dump_json(exclude_none=True))
                return
            if found is None:
                return
            yield _event("request", UnlearningRequest.of(found).model_dump_json())
            coming = asyncio.ensure_future(anext(watch, None))
    finally:
        coming.cancel()


def _event(name: str, data: str) -> bytes:
    return f"event: {name}\ndata: {data}\n\n".encode()


def _json(
    request: RequestRecord,
    *,
    status: HTTPStatus = HTTPStatus.OK,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    body = UnlearningRequest.of(request).model_dump(mode="json")
    return JSONResponse(body, status_code=status, headers=headers)
