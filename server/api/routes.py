"""The routes of `/admin`."""

from __future__ import annotations

import re
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.responses import Response

from alter_core.errors import BundleNotFoundError, ConfigError
from server.audit import MAX_REASON_LENGTH, check_reason
from server.domains import DomainService

from .attempts import attempt_of
from .conditions import etag, precondition
from .idempotency import IdempotencyStore
from .models import (
    REASON,
    Activated,
    ActivateRequest,
    ForgetDomain,
    ForgetDomainList,
    Problem,
    Revoked,
    Status,
    Switch,
    domain_fields,
)
from .problems import MEDIA_TYPE, ProblemError
from .runtime import AlterRuntime


def get_service(request: Request) -> DomainService:
    """Raises: ProblemError 503 while the server starts."""
    runtime: AlterRuntime = request.app.state.alter
    if runtime.service is None:
        raise ProblemError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "starting",
            "The server is starting",
            "The engine is not ready yet",
            fix="Try again in a few seconds.",
            headers={"Retry-After": "5"},
        )
    return runtime.service


def get_idempotency(request: Request) -> IdempotencyStore:
    """The application's store of answers."""
    store: IdempotencyStore = request.app.state.idempotency
    return store


Service = Annotated[DomainService, Depends(get_service)]
Idempotency = Annotated[IdempotencyStore, Depends(get_idempotency)]
IfMatch = Annotated[str | None, Header(description='`"4"`: only if nothing changed since epoch 4')]
IfNoneMatch = Annotated[str | None, Header(description="`*`: only if the name is not active")]
Reason = Annotated[
    str | None,
    Header(
        alias=REASON,
        description="A case number for the audit log, percent-encoded UTF-8; never forgotten text",
    ),
]
IdempotencyKey = Annotated[str | None, Header(description="Repetitions are done once")]


def _problems(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        int(status): {"description": status.phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, *statuses)
    } | {"default": {"description": "Any other problem", "model": Problem}}


router = APIRouter(tags=["forget domains"], dependencies=[Depends(HTTPBearer(auto_error=False))])


@router.post(
    "/forget-domains",
    summary="Activate a bundle",
    status_code=HTTPStatus.CREATED,
    response_model=Activated,
    responses={
        HTTPStatus.OK: {"model": Activated, "description": "Replaced, or active already"},
        **_problems(
            HTTPStatus.BAD_REQUEST,
            HTTPStatus.CONFLICT,
            HTTPStatus.PRECONDITION_FAILED,
            HTTPStatus.UNPROCESSABLE_ENTITY,
            HTTPStatus.SERVICE_UNAVAILABLE,
        ),
    },
)
async def activate(
    body: ActivateRequest,
    request: Request,
    service: Service,
    idempotency: Idempotency,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Forgets a domain: from the answer on, every token is computed with its expert.

    201 for a new name; 200 if the same digest is active already or another one was replaced, in one
    switch.
    """

    async def perform() -> Response:
        bundle, condition = bundle_path(body.bundle), precondition(if_match, if_none_match)
        done = await service.activate(
            body.name,
            bundle,
            body.in_flight,
            precondition=condition,
            cause=attempt_of(request).hand_over(body.reason),
        )
        answer = Activated(
            **domain_fields(done.domain, service.routed_tokens(body.name)),
            outcome=done.outcome,
            switch=None if done.report is None else Switch.of(done.report),
        )
        is_new = done.outcome == "created"
        location = f"{request.scope['root_path']}/forget-domains/{body.name}"
        return _json(
            answer,
            done.epoch,
            status=HTTPStatus.CREATED if is_new else HTTPStatus.OK,
            headers={"Location": location} if is_new else {},
        )

    return await idempotency.run(request, idempotency_key, perform)


@router.get(
    "/forget-domains",
    summary="List what is active",
    response_model=ForgetDomainList,
    responses=_problems(),
)
async def list_domains(service: Service) -> Response:
    """All active domains, by name."""
    await service.collect_routed_tokens()
    domains = [ForgetDomain.of(d, service.routed_tokens(d.name)) for d in service.list()]
    return _json(ForgetDomainList(epoch=service.epoch, domains=domains), service.epoch)


@router.get(
    "/forget-domains/{name}",
    summary="Show one domain",
    response_model=ForgetDomain,
    responses=_problems(HTTPStatus.NOT_FOUND),
)
async def show_domain(name: str, service: Service) -> Response:
    """One active domain."""
    service.show(name)
    await service.collect_routed_tokens()
    domain = service.show(name)
    return _json(ForgetDomain.of(domain, service.routed_tokens(name)), service.epoch)


@router.delete(
    "/forget-domains/{name}",
    summary="Revoke a domain",
    response_model=Revoked,
    responses=_problems(
        HTTPStatus.BAD_REQUEST,
        HTTPStatus.NOT_FOUND,
        HTTPStatus.PRECONDITION_FAILED,
        HTTPStatus.SERVICE_UNAVAILABLE,
    ),
)
async def revoke(
    name: str,
    request: Request,
    service: Service,
    idempotency: Idempotency,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
    idempotency_key: IdempotencyKey = None,
    reason: Reason = None,
) -> Response:
    """Ends the forgetting of a domain; the base model's answers come back."""

    async def perform() -> Response:
        given, condition = header_reason(reason), precondition(if_match, if_none_match)
        cause = attempt_of(request).hand_over(given)
        done = await service.revoke(name, precondition=condition, cause=cause)
        answer = Revoked(name=name, digest=done.domain.digest, switch=Switch.of(done.report))
        return _json(answer, done.report.epoch)

    return await idempotency.run(request, idempotency_key, perform)


@router.get(
    "/status", summary="The server as a whole", response_model=Status, responses=_problems()
)
async def status(service: Service) -> Response:
    """Epoch, substrate, slots, canary and queue."""
    return _json(Status.of(service.status()), service.epoch)


def bundle_path(text: str) -> Path:
    """The folder that a request's `bundle` names: an absolute path or a file URI without a host.

    Raises: BundleNotFoundError.
    """
    if re.match(r"(?i)file:", text) is not None:
        uri = urlsplit(text)
        if uri.netloc in ("", "localhost") and not uri.query and not uri.fragment:
            text = unquote(uri.path)
    if not text.startswith("/") or "\0" in text:
        raise BundleNotFoundError(
            "This bundle cannot be located",
            expected="an absolute path on the server's machine, or file:///absolute/path",
            got=repr(text[:200]),
            fix="Copy the bundle to the server's machine first; other schemes are not supported.",
        )
    return Path(text)


def header_reason(text: str | None) -> str | None:
    """The reason that a header carries. Raises: ProblemError 400."""
    if text is None:
        return None
    try:
        if not text.isascii():
            raise ValueError
        return check_reason(unquote(text, errors="strict"))
    except (ConfigError, ValueError) as error:
        raise ProblemError(
            HTTPStatus.BAD_REQUEST,
            "malformed-header",
            "A header is malformed",
            f"{REASON} cannot be recorded",
            expected=f"1 to {MAX_REASON_LENGTH} printable characters, percent-encoded UTF-8",
            got=f"{len(text)} characters",
            fix="Give the case number alone.",
        ) from error


def _json(
    body: BaseModel,
    epoch: int,
    *,
    status: HTTPStatus = HTTPStatus.OK,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(
        body.model_dump(mode="json"),
        status_code=status,
        headers={"ETag": etag(epoch)} | (headers or {}),
    )
