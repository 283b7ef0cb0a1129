"""The admin side from outside: a typed client that raises the server's own errors."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from alter_core.errors import AlterError, ConfigError, SwitchError, problem_kind
from server.api.models import (
    REASON,
    Answers,
    Fleet,
    ForgetDomain,
    ForgetDomainList,
    Operation,
    Problem,
    Status,
    Trace,
    Whoami,
)
from server.api.preferences import MAX_WAIT_S
from server.api.problems import MEDIA_TYPE, TYPE_PREFIX
from server.api.request_models import UnlearningRequest, UnlearningRequestList
from server.audit import check_reason
from server.domain_rules import check_domain_name
from server.engine.base import InFlight, Message
from server.requests.records import Approval

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 300.0
"""Reading, verifying and switching a large expert takes a while."""
_WAIT_S = MAX_WAIT_S // 2
"""Asked of the server at once; proxies cut what is silent for longer."""

_REQUESTS = "/unlearning-requests"

Answer = TypeVar("Answer", bound=BaseModel)


class _Envelope(BaseModel):
    model_config = ConfigDict(extra="allow")

    payload: str


class AdminClient:
    """Talks to `/admin` of one server. Close it, or use it in a `with` statement.

    Every method raises the class of `alter_core.errors` that the server raised, ConfigError for a
    token that is missing or wrong, and AlterError for anything else.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        token: str | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        transport: httpx.BaseTransport | None = None,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`tls`: what to trust and to show where the server's certificate is of an authority of one's own, or
        clients need one."""
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._url = url
        self._timeout_s = timeout_s
        self._http = httpx.Client(
            base_url=url.rstrip("/") + "/admin",
            headers=headers,
            timeout=timeout_s,
            transport=transport,
            verify=tls or True,
        )

    def __enter__(self) -> AdminClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def list_domains(self) -> ForgetDomainList:
        """What is active."""
        return self._ask("GET", "/forget-domains", ForgetDomainList)

    def show(self, name: str) -> ForgetDomain:
        """One active domain."""
        return self._ask("GET", _path(name), ForgetDomain)

    def status(self) -> Status:
        """The server as a whole."""
        return self._ask("GET", "/status", Status)

    def whoami(self) -> Whoami:
        """Name and role of the token."""
        return self._ask("GET", "/whoami", Whoami)

    def fleet(self) -> Fleet:
        """All servers of the registry."""
        return self._ask("GET", "/fleet", Fleet)

    def trace(self, prompt: str | Sequence[Message]) -> Trace:
        """How a text, or a chat, is routed, token by token. Raises: PromptError."""
        return self._ask("POST", "/trace", Trace, body=_prompt_body(prompt))

    def answers(self, prompt: str | Sequence[Message], *, max_tokens: int = 64) -> Answers:
        """What is answered now, and what the base model would answer. Raises: PromptError."""
        body = _prompt_body(prompt) | {"max_tokens": max_tokens}
        return self._ask("POST", "/answers", Answers, body=body)

    def operation(self, operation_id: str, *, wait_s: int = 0) -> Operation:
        """How far a change has come; waits up to `wait_s` for it to be active or failed."""
        headers = {"Prefer": f"wait={wait_s}"} if wait_s else {}
        path = f"/operations/{quote(operation_id, safe='')}"
        return self._ask("GET", path, Operation, headers=headers)

    def activate(
        self,
        name: str,
        bundle: str,
        *,
        in_flight: InFlight = "recompute",
        if_epoch: int | None = None,
        is_new: bool = False,
        idempotency_key: str | None = None,
        reason: str | None = None,
        is_awaited: bool = True,
    ) -> Operation:
        """Activates the bundle at a path on the server's machine, and waits until it holds everywhere.

        `if_epoch`: only if nothing has changed since. `is_new`: only if the name is not active.
        `reason`: a case number for the audit log. `is_awaited` False: returns as soon as it is recorded.

        Raises: SwitchError if no server can apply it; the change stays recorded.
        """
        headers = _conditions(if_epoch, idempotency_key)
        if is_new:
            headers["If-None-Match"] = "*"
        body = {"name": name, "bundle": bundle, "in_flight": in_flight}
        if reason is not None:
            body["reason"] = check_reason(reason)
        return self._change("POST", "/forget-domains", headers, body, is_awaited)

    def revoke(
        self,
        name: str,
        *,
        if_epoch: int | None = None,
        idempotency_key: str | None = None,
        reason: str | None = None,
        is_awaited: bool = True,
    ) -> Operation:
        """Ends a domain; see `activate`."""
        headers = _conditions(if_epoch, idempotency_key)
        if reason is not None:
            headers[REASON] = quote(check_reason(reason))
        return self._change("DELETE", _path(name), headers, None, is_awaited)

    def create_request(
        self,
        domain: str,
        *,
        forget: Sequence[dict[str, Any]] = (),
        documents: Sequence[dict[str, str]] = (),
        source: str | None = None,
        retain: Sequence[dict[str, Any]] = (),
        approval: Approval = "automatic",
        deadline: datetime | None = None,
        reason: str | None = None,
        idempotency_key: str | None = None,
    ) -> UnlearningRequest:
        """Asks for a domain to be forgotten: rows, documents (`name`, `text`), or a file the server reads.

        Raises: TrainingDataError, DomainNameError, RequestConflictError, RequestsClosedError.
        """
        body: dict[str, Any] = {
            "domain": domain,
            "forget": list(forget),
            "documents": list(documents),
            "retain": list(retain),
            "approval": approval,
        }
        if source is not None:
            body["source"] = source
        if deadline is not None:
            body["deadline"] = deadline.astimezone(UTC).isoformat()
        if reason is not None:
            body["reason"] = check_reason(reason)
        headers = _conditions(None, idempotency_key)
        return self._ask("POST", _REQUESTS, UnlearningRequest, headers=headers, body=body)

    def list_requests(self) -> UnlearningRequestList:
        """Unlearning requests of all servers, the newest first."""
        return self._ask("GET", _REQUESTS, UnlearningRequestList)

    def show_request(self, request_id: str) -> UnlearningRequest:
        """One unlearning request. Raises: RequestNotFoundError."""
        return self._ask("GET", _request_path(request_id), UnlearningRequest)

    def approve_request(self, request_id: str, *, reason: str | None = None) -> UnlearningRequest:
        """Answers the question that a request waits with. Raises: RequestConflictError."""
        return self._decide(request_id, "approve", reason)

    def cancel_request(self, request_id: str, *, reason: str | None = None) -> UnlearningRequest:
        """Ends a request that is not being activated yet. Raises: RequestConflictError."""
        return self._decide(request_id, "cancel", reason)

    def watch_request(self, request_id: str) -> Iterator[UnlearningRequest]:
        """The request now and at every change, until it has ended and its text is deleted."""
        path = f"{_request_path(request_id)}/events"
        try:
            with self._http.stream("GET", path, timeout=self._timeout_s) as response:
                if not response.is_success:
                    response.read()
                    raise error_of(response)
                kind = ""
                for line in response.iter_lines():
                    if line.startswith("event: "):
                        kind = line.removeprefix("event: ")
                    elif line.startswith("data: ") and kind == "request":
                        yield UnlearningRequest.model_validate_json(line.removeprefix("data: "))
                    elif line.startswith("data: "):
                        raise _error_of_problem(line.removeprefix("data: ").encode(), response)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._silent(error) from error

    def evidence(self, request_id: str) -> dict[str, Any]:
        """The envelope with the facts about a request. Raises: RequestNotFoundError."""
        return self._ask("GET", f"{_request_path(request_id)}/evidence", _Envelope).model_dump()

    def _decide(self, request_id: str, action: str, reason: str | None) -> UnlearningRequest:
        headers = {} if reason is None else {REASON: quote(check_reason(reason))}
        path = f"{_request_path(request_id)}/{action}"
        return self._ask("POST", path, UnlearningRequest, headers=headers)

    def _change(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: dict[str, str] | None,
        is_awaited: bool,
    ) -> Operation:
        if is_awaited:
            headers["Prefer"] = f"wait={_WAIT_S}"
        deadline = time.monotonic() + self._timeout_s
        operation = self._ask(method, path, Operation, headers=headers, body=body)
        while is_awaited and operation.state in ("pending", "applying"):
            if time.monotonic() > deadline:
                raise SwitchError(
                    f"The change is recorded as epoch {operation.epoch}, but does not hold everywhere yet",
                    expected=f"all servers within {self._timeout_s:.0f} s",
                    got=", ".join(laggard.replica_id for laggard in operation.lagging),
                    fix=f"See `alter fleet`; ask again for the operation {operation.id}.",
                )
            operation = self.operation(operation.id, wait_s=_WAIT_S)
        if operation.state == "failed":
            raise SwitchError(
                f"The change is recorded as epoch {operation.epoch}, and no server could apply it",
                expected="a server that applies it",
                got=operation.error,
                fix="It is tried again. See `alter fleet` and the server's log, or revoke the domain.",
            )
        return operation

    def _ask(
        self,
        method: str,
        path: str,
        answer: type[Answer],
        *,
        headers: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
    ) -> Answer:
        try:
            response = self._http.request(method, path, headers=headers, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._silent(error) from error
        if not response.is_success:
            raise error_of(response)
        try:
            return answer.model_validate_json(response.content)
        except ValidationError as error:
            raise _foreign(response) from error

    def _silent(self, error: Exception) -> AlterError:
        return AlterError(
            f"The server at {self._url} does not answer",
            expected="a server that was started with `alter serve`",
            got=str(error) or type(error).__name__,
            fix="Check --url or ALTER_URL, and that the server has started.",
        )


def error_of(response: httpx.Response) -> AlterError:
    """The error that a refusal stands for."""
    if not response.headers.get("content-type", "").startswith(MEDIA_TYPE):
        return _foreign(response)
    return _error_of_problem(response.content, response)


def _error_of_problem(document: bytes, response: httpx.Response) -> AlterError:
    try:
        problem = Problem.model_validate_json(document)
    except ValidationError:
        return _foreign(response)
    if problem.status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        error_class: type[AlterError] = ConfigError
    else:
        error_class = _CLASSES.get(problem.type, AlterError)
    return error_class(problem.detail, expected=problem.expected, got=problem.got, fix=problem.fix)


def _foreign(response: httpx.Response) -> AlterError:
    return AlterError(
        f"{response.request.url} is not an admin side of ALTER, or of another version",
        expected="an answer as /openapi.json describes it",
        got=f"status {response.status_code}, {response.headers.get('content-type', 'no content')}",
        fix="Check --url or ALTER_URL.",
    )


def _path(name: str) -> str:
    check_domain_name(name)
    return f"/forget-domains/{name}"


def _request_path(request_id: str) -> str:
    return f"{_REQUESTS}/{quote(request_id, safe='')}"


def _prompt_body(prompt: str | Sequence[Message]) -> dict[str, Any]:
    return {"text": prompt} if isinstance(prompt, str) else {"messages": list(prompt)}


def _conditions(if_epoch: int | None, idempotency_key: str | None) -> dict[str, str]:
    headers = {}
    if if_epoch is not None:
        headers["If-Match"] = f'"{if_epoch}"'
    if idempotency_key is not None:
        headers["Idempotency-Key"] = idempotency_key
    return headers


def _by_type(error_class: type[AlterError]) -> dict[str, type[AlterError]]:
    classes = {TYPE_PREFIX + problem_kind(error_class): error_class}
    for subclass in error_class.__subclasses__():
        classes |= _by_type(subclass)
    return classes


_CLASSES = _by_type(AlterError)
