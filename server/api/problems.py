"""Errors of `/admin` as RFC 9457 problem documents.

The type of a problem is `urn:alter-server:problem:` and the error class in kebab case, so that a
client can tell them apart without reading prose; `expected`, `got` and `fix` are extension members.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from alter_core.errors import (
    AlterError,
    AuditError,
    BundleError,
    ChangeRequestError,
    DomainConflictError,
    DomainNameError,
    DomainNotFoundError,
    EngineError,
    EpochConflictError,
    IdempotencyConflictError,
    NoFreeSlotError,
    OperationNotFoundError,
    PromptError,
    RegistryError,
    RequestConflictError,
    RequestNotFoundError,
    TrainingDataError,
    UnlearningRequestError,
    problem_kind,
)

from .models import FieldError, Problem

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:alter-server:problem:"

_STATUS: tuple[tuple[type[AlterError], HTTPStatus], ...] = (
    (DomainNotFoundError, HTTPStatus.NOT_FOUND),
    (DomainNameError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (DomainConflictError, HTTPStatus.CONFLICT),
    (NoFreeSlotError, HTTPStatus.CONFLICT),
    (BundleError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (AuditError, HTTPStatus.SERVICE_UNAVAILABLE),
    (ChangeRequestError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (EpochConflictError, HTTPStatus.PRECONDITION_FAILED),
    (IdempotencyConflictError, HTTPStatus.CONFLICT),
    (OperationNotFoundError, HTTPStatus.NOT_FOUND),
    (RegistryError, HTTPStatus.SERVICE_UNAVAILABLE),
    (PromptError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (TrainingDataError, HTTPStatus.UNPROCESSABLE_ENTITY),
    (RequestNotFoundError, HTTPStatus.NOT_FOUND),
    (RequestConflictError, HTTPStatus.CONFLICT),
    (UnlearningRequestError, HTTPStatus.SERVICE_UNAVAILABLE),
    (EngineError, HTTPStatus.SERVICE_UNAVAILABLE),
)
_MAX_FIELD_ERRORS = 20


class ProblemError(Exception):
    """A refusal that exists only in HTTP: of a token, a header, a condition."""

    def __init__(
        self,
        status: HTTPStatus,
        kind: str,
        title: str,
        detail: str,
        *,
        expected: str | None = None,
        got: str | None = None,
        fix: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.headers = dict(headers or {})
        self.kind = kind
        self.problem = Problem(
            type=TYPE_PREFIX + kind,
            title=title,
            status=status,
            detail=detail,
            expected=expected,
            got=got,
            fix=fix,
        )


def status_of(error: AlterError) -> HTTPStatus:
    """The HTTP status of an error of ALTER."""
    for error_class, status in _STATUS:
        if isinstance(error, error_class):
            return status
    return HTTPStatus.INTERNAL_SERVER_ERROR


def problem_of(error: AlterError) -> Problem:
    """The problem document of an error of ALTER."""
    return Problem(
        type=TYPE_PREFIX + problem_kind(type(error)),
        title=(type(error).__doc__ or type(error).__name__).splitlines()[0].rstrip("."),
        status=status_of(error),
        detail=error.what,
        expected=error.expected,
        got=error.got,
        fix=error.fix,
    )


def problem_response(
    problem: Problem, instance: str, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The response that carries a problem."""
    body = problem.model_copy(update={"instance": instance}).model_dump(
        mode="json", exclude_none=True
    )
    return JSONResponse(body, status_code=problem.status, headers=headers, media_type=MEDIA_TYPE)


def add_problem_handlers(app: FastAPI) -> None:
    """Makes every error that leaves `app` a problem document."""
    app.add_exception_handler(ProblemError, _on_problem_error)
    app.add_exception_handler(AlterError, _on_alter_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_exception)


def _on_problem_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ProblemError)
    return problem_response(error.problem, request.url.path, error.headers)


def _on_alter_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AlterError)
    problem = problem_of(error)
    if problem.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        logger.error("%s %s: %s", request.method, request.url.path, error)
    return problem_response(problem, request.url.path)


def _on_validation_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    details: list[dict[str, Any]] = list(error.errors())
    is_json = all(e["type"] != "json_invalid" for e in details)
    problem = Problem(
        type=TYPE_PREFIX + ("invalid-request" if is_json else "malformed-json"),
        title="The request is not valid" if is_json else "The body is not JSON",
        status=HTTPStatus.UNPROCESSABLE_ENTITY if is_json else HTTPStatus.BAD_REQUEST,
        detail=_first_line(details),
        expected="a JSON object as /openapi.json describes it, sent as application/json",
        fix="Correct the fields under `errors`.",
        errors=[
            FieldError(location=_location(e), message=str(e["msg"]))
            for e in details[:_MAX_FIELD_ERRORS]
        ],
    )
    return problem_response(problem, request.url.path)


def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    problem = Problem(
        type=TYPE_PREFIX + status.phrase.lower().replace(" ", "-"),
        title=status.phrase,
        status=status,
        detail=f"{request.method} {request.url.path}: {error.detail}",
        fix="See /openapi.json for the routes under /admin.",
    )
    return problem_response(problem, request.url.path, error.headers)


def _on_exception(request: Request, error: Exception) -> JSONResponse:
    problem = Problem(
        type=TYPE_PREFIX + "internal",
        title="Internal error",
        status=HTTPStatus.INTERNAL_SERVER_ERROR,
        detail="An unexpected error occurred; it is in the server's log",
    )
    logger.error("%s %s failed: %s", request.method, request.url.path, type(error).__name__)
    return problem_response(problem, request.url.path)


def _location(detail: Mapping[str, Any]) -> str:
    return ".".join(str(part) for part in detail["loc"])


def _first_line(details: list[dict[str, Any]]) -> str:
    if not details:
        return "The request is not valid"
    return f"{_location(details[0])}: {details[0]['msg']}"
