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

from alter_core.errors import (
    AlterError,
    BundleNotFoundError,
    ConfigError,
    SwitchError,
    problem_kind,
)
from server.audit import MAX_REASON_LENGTH, check_reason
from server.domain_rules import Precondition
from server.operations import Operation as OperationRecord
from server.parts import Parts

from .attempts import attempt_of, record_attempt
from .conditions import etag, precondition
from .idempotency import REPLAYED, idempotency_of
from .models import (
    REASON,
    ActivateRequest,
    Answers,
    AnswersRequest,
    Fleet,
    ForgetDomain,
    ForgetDomainList,
    Operation,
    Problem,
    Status,
    Trace,
    TraceRequest,
    Whoami,
)
from .preferences import APPLIED, MAX_WAIT_S, wait_of
from .problems import MEDIA_TYPE, ProblemError
from .runtime import AlterRuntime


def get_parts(request: Request) -> Parts:
    """Raises: ProblemError 503 while the server starts."""
    runtime: AlterRuntime = request.app.state.alter
    if runtime.parts is None:
        raise ProblemError(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "starting",
            "The server is starting",
            "The engine is not ready yet",
            fix="Try again in a few seconds.",
            headers={"Retry-After": "5"},
        )
    return runtime.parts


With = Annotated[Parts, Depends(get_parts)]
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
Prefer = Annotated[
    str | None,
    Header(
        description=f"`wait=N`: answer when it is done, or after N seconds, {MAX_WAIT_S} at most"
    ),
]


def problems(*statuses: HTTPStatus) -> dict[int | str, dict[str, Any]]:
    """Responses of a route, for OpenAPI."""
    schema = {"$ref": "#/components/schemas/Problem"}
    return {
        int(status): {"description": status.phrase, "content": {MEDIA_TYPE: {"schema": schema}}}
        for status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN, *statuses)
    } | {"default": {"description": "Any other problem", "model": Problem}}


router = APIRouter(tags=["forget domains"], dependencies=[Depends(HTTPBearer(auto_error=False))])


@router.post(
    "/forget-domains",
    summary="Activate a bundle",
    status_code=HTTPStatus.ACCEPTED,
    response_model=Operation,
    responses={
        HTTPStatus.OK: {
            "model": Operation,
            "description": "Replaced everywhere, or active already",
        },
        HTTPStatus.CREATED: {"model": Operation, "description": "Active everywhere"},
        **problems(
            HTTPStatus.BAD_REQUEST,
            HTTPStatus.CONFLICT,
            HTTPStatus.PRECONDITION_FAILED,
            HTTPStatus.PRECONDITION_REQUIRED,
            HTTPStatus.UNPROCESSABLE_ENTITY,
            HTTPStatus.SERVICE_UNAVAILABLE,
        ),
    },
)
async def activate(
    body: ActivateRequest,
    request: Request,
    parts: With,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
    idempotency_key: IdempotencyKey = None,
    prefer: Prefer = None,
) -> Response:
    """Forgets a domain. The change is durable when it is answered, and every server applies it.

    202 and the operation to poll at `Location`; with `Prefer: wait=N` 201 for a new name, 200 for
    another one, as soon as no server can generate a token without it.
    """
    bundle = allowed_place(request, body.bundle)
    condition = _condition(request, if_match, if_none_match)
    operation = await parts.operations.activate(
        body.name,
        bundle,
        body.in_flight,
        precondition=condition,
        idempotency=await idempotency_of(request, idempotency_key),
        cause=attempt_of(request).hand_over(body.reason),
    )
    return await _answer(request, parts, operation)


@router.delete(
    "/forget-domains/{name}",
    summary="Revoke a domain",
    status_code=HTTPStatus.ACCEPTED,
    response_model=Operation,
    responses={
        HTTPStatus.OK: {"model": Operation, "description": "Revoked everywhere"},
        **problems(
            HTTPStatus.BAD_REQUEST,
            HTTPStatus.NOT_FOUND,
            HTTPStatus.CONFLICT,
            HTTPStatus.PRECONDITION_FAILED,
            HTTPStatus.PRECONDITION_REQUIRED,
            HTTPStatus.SERVICE_UNAVAILABLE,
        ),
    },
)
async def revoke(
    name: str,
    request: Request,
    parts: With,
    if_match: IfMatch = None,
    if_none_match: IfNoneMatch = None,
    idempotency_key: IdempotencyKey = None,
    reason: Reason = None,
    prefer: Prefer = None,
) -> Response:
    """Ends the forgetting of a domain; the base model's answers come back.

    202 and the operation to poll at `Location`; with `Prefer: wait=N` 200 once it holds everywhere.
    """
    given = header_reason(reason)
    condition = _condition(request, if_match, if_none_match)
    operation = await parts.operations.revoke(
        name,
        precondition=condition,
        idempotency=await idempotency_of(request, idempotency_key),
        cause=attempt_of(request).hand_over(given),
    )
    return await _answer(request, parts, operation)


@router.get(
    "/operations/{operation_id}",
    summary="Show how far a change has come",
    response_model=Operation,
    responses=problems(HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE),
)
async def show_operation(
    operation_id: str, request: Request, parts: With, prefer: Prefer = None
) -> Response:
    """With `Prefer: wait=N` once it is active or failed."""
    operation = await parts.operations.get(operation_id)
    operation, headers = await _awaited(request, parts, operation)
    answer = Operation.of(operation, parts.service)
    return JSONResponse(answer.model_dump(mode="json"), headers=headers)


@router.get(
    "/forget-domains",
    summary="List what is active",
    response_model=ForgetDomainList,
    responses=problems(),
)
async def list_domains(parts: With) -> Response:
    """All domains that this server applies, by name."""
    service = parts.service
    await service.collect_routed_tokens()
    domains = [ForgetDomain.of(d, service.routed_tokens(d.name)) for d in service.list()]
    return _json(ForgetDomainList(epoch=service.epoch, domains=domains), service.epoch)


@router.get(
    "/forget-domains/{name}",
    summary="Show one domain",
    response_model=ForgetDomain,
    responses=problems(HTTPStatus.NOT_FOUND),
)
async def show_domain(name: str, parts: With) -> Response:
    """One domain that this server applies."""
    service = parts.service
    service.show(name)
    await service.collect_routed_tokens()
    domain = service.show(name)
    return _json(ForgetDomain.of(domain, service.routed_tokens(name)), service.epoch)


@router.get(
    "/status", summary="This server as a whole", response_model=Status, responses=problems()
)
async def status(parts: With) -> Response:
    """Epoch, lease, substrate, slots, canary and queue."""
    return _json(Status.of(parts.service, parts.reconciler), parts.service.epoch)


@router.get("/whoami", summary="Whose token this is", response_model=Whoami, responses=problems())
async def whoami(request: Request) -> Response:
    """Name and role of the token that the request came with."""
    principal = attempt_of(request).principal
    answer = Whoami(name=principal.name, role=principal.role)
    return JSONResponse(answer.model_dump(mode="json"))


@router.get(
    "/fleet",
    summary="All servers of the registry",
    response_model=Fleet,
    responses=problems(HTTPStatus.SERVICE_UNAVAILABLE),
)
async def fleet(parts: With) -> Response:
    """Who applies what, who lags and why."""
    head, replicas = await parts.operations.fleet()
    answer = Fleet.of(head, replicas, parts.reconciler.replica_id)
    return JSONResponse(answer.model_dump(mode="json"))


@router.post(
    "/trace",
    summary="Show how a text is routed",
    response_model=Trace,
    responses=problems(HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.SERVICE_UNAVAILABLE),
)
async def trace(body: TraceRequest, request: Request, parts: With) -> Response:
    """Entropy, path and experts of every token, as this server computes it now, beside other requests.

    A chat is rendered by the server's template, with the beginning of an answer unless it ends in one.
    One trace at a time; it changes nothing, and the text is kept nowhere.
    """
    runtime: AlterRuntime = request.app.state.alter
    if runtime.prompts is None or not runtime.is_serving:
        raise _not_serving()
    prompt = await runtime.prompts.read(body.prompt)
    routed = await parts.service.trace([token.token_id for token in prompt])
    return _json(Trace.of(prompt, routed), routed.epoch)


@router.post(
    "/answers",
    summary="Show what is answered, and what the base model would answer",
    response_model=Answers,
    responses=problems(HTTPStatus.UNPROCESSABLE_ENTITY, HTTPStatus.SERVICE_UNAVAILABLE),
)
async def answers(body: AnswersRequest, request: Request, parts: With) -> Response:
    """The greedy answer of this server, and beside it that of the base model, if that may be shown.

    The base model is another copy, on the CPU: nothing goes around the experts of the engine. Each such
    answer stands in the audit log, without the text.
    """
    runtime: AlterRuntime = request.app.state.alter
    prompts, writer = runtime.prompts, runtime.writer
    if prompts is None or writer is None or not runtime.is_serving:
        raise _not_serving()
    current = await writer.write(body.prompt, max_tokens=body.max_tokens)
    if not runtime.is_serving:  # or it may have been computed without a domain
        raise _not_serving()
    epoch, base = parts.service.epoch, None
    if runtime.base_answers is not None:
        token_ids = [token.token_id for token in await prompts.read(body.prompt)]
        attempt = attempt_of(request)
        await record_attempt(runtime, attempt, "base-answer", "begun")
        try:
            base = await runtime.base_answers.answer(token_ids, max_tokens=body.max_tokens)
        except AlterError as error:
            kind = problem_kind(type(error))
            await record_attempt(runtime, attempt, "base-answer", "failed", error=kind)
            raise
        await record_attempt(runtime, attempt, "base-answer", "done")
    return _json(Answers(epoch=epoch, current=current, base=base), epoch)


def _not_serving() -> ProblemError:
    return ProblemError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        "not-serving",
        "This server does not generate",
        "Without trust in its engine, or leave of the fleet, a server computes nothing",
        fix="See /admin/status, and try again when /health/ready is green.",
        headers={"Retry-After": "5"},
    )


async def _awaited(
    request: Request, parts: Parts, operation: OperationRecord
) -> tuple[OperationRecord, dict[str, str]]:
    """The operation after the preferred wait, and the headers that say so."""
    wait_s = wait_of(request.headers.getlist("prefer"))
    if wait_s is None:
        return operation, {}
    return await parts.operations.wait(operation, wait_s), {APPLIED: f"wait={wait_s}"}


async def _answer(request: Request, parts: Parts, operation: OperationRecord) -> Response:
    """Raises: SwitchError for a change that is recorded, and that no server could apply."""
    operation, headers = await _awaited(request, parts, operation)
    root, change = request.scope["root_path"], operation.change
    if operation.is_replayed:
        headers[REPLAYED] = "true"
    status = HTTPStatus.OK
    if operation.state == "failed":
        raise SwitchError(
            f"The change is recorded as epoch {change.epoch}, and no server could apply it: nothing is "
            "generated until one can",
            expected="a server that applies it",
            got=operation.error,
            fix="It is tried again. See the server's log and /admin/fleet, or revoke the domain.",
        )
    if operation.state != "active":
        status = HTTPStatus.ACCEPTED
        headers["Location"] = f"{root}/operations/{change.operation_id}"
    elif operation.outcome == "created":
        status = HTTPStatus.CREATED
        headers["Location"] = f"{root}/forget-domains/{change.domain}"
    return _json(
        Operation.of(operation, parts.service), operation.epoch, status=status, headers=headers
    )


def _condition(
    request: Request, if_match: str | None, if_none_match: str | None
) -> Precondition | None:
    """Raises: ProblemError 400 for a malformed header, 428 for none where one is demanded."""
    runtime: AlterRuntime = request.app.state.alter
    condition = precondition(if_match, if_none_match)
    if condition is None and runtime.requires_if_match:
        raise ProblemError(
            HTTPStatus.PRECONDITION_REQUIRED,
            "precondition-required",
            "A change must name the epoch that it was decided on",
            "This server takes no change without a condition",
            expected="If-Match with the epoch, or If-None-Match: *",
            got="neither",
            fix="Send the ETag of what you have read; on the command line, --if-epoch.",
        )
    return condition


def allowed_place(request: Request, place: str) -> Path | str:
    """The path, without links, or the URL that a request names.

    Raises: BundleNotFoundError, BundleSourceError.
    """
    runtime: AlterRuntime = request.app.state.alter
    if re.match(r"(?i)(?!file:)[a-z][a-z0-9+.-]*:", place) is not None:
        runtime.sources.check(place)
        return place
    return Path(runtime.sources.resolve(str(bundle_path(place))))


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
            expected="an absolute path on the server's machine, file:///absolute/path, or a URL",
            got=repr(text[:200]),
            fix="Copy the bundle to the server's machine, or to a place of --alter-bundle-sources.",
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
