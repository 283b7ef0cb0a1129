"""What becomes of a request that wants to change something, also if it never gets to the service.

If a change is refused by role, header or body, that is recorded here; from `hand_over` on, the service
records.
"""

from __future__ import annotations

import asyncio
import json
import re
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from alter_core.errors import AuditError
from server.audit import Action, AuditEntry, Cause, Outcome
from server.domain_rules import is_domain_name
from server.tokens import Principal
from server.tracing import NO_TRACING

from .middleware import route_path
from .problems import TYPE_PREFIX, problem_of, problem_response
from .request_ids import REQUEST_ID, request_id_of
from .runtime import AlterRuntime

_DOMAINS = re.compile(r"/forget-domains(?:/(?P<name>[^/]*))?")
_ACTIONS: dict[str, Action] = {"POST": "activate", "DELETE": "revoke"}
_REQUESTS = re.compile(r"/unlearning-requests(?:/[^/]*/(?P<action>approve|cancel))?")
_REQUEST_ACTIONS: dict[str | None, Action] = {
    None: "request",
    "approve": "approve",
    "cancel": "cancel",
}


class Attempt:
    """One request, at `request.state.attempt`."""

    def __init__(self, principal: Principal, request_id: str) -> None:
        self.principal = principal
        self.request_id = request_id
        self.is_handed_over = False

    def hand_over(self, reason: str | None) -> Cause:
        """The cause for the service, which records the attempt from here on."""
        self.is_handed_over = True
        return Cause(actor=self.principal.name, request_id=self.request_id, reason=reason)


def attempt_of(request: Request) -> Attempt:
    """The attempt that a request is."""
    attempt: Attempt = request.state.attempt
    return attempt


class AttemptMiddleware:
    """Pure ASGI; stands inside the authentication."""

    def __init__(self, app: ASGIApp, runtime: AlterRuntime) -> None:
        self._app = app
        self._runtime = runtime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        attempt = Attempt(scope["state"]["principal"], request_id_of(scope))
        action, name = _change(scope)
        held: Message | None = None

        async def forward(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = attempt.request_id
                is_refusal = message["status"] >= HTTPStatus.BAD_REQUEST and action is not None
                if is_refusal and not attempt.is_handed_over:
                    held = message  # until it is recorded
                    return
            if held is not None:
                assert action is not None
                begin, held = held, None
                try:
                    kind = _problem_kind(message.get("body", b""))
                    await self._refused(attempt, action, name, kind)
                except AuditError as error:
                    # Problem documents are sent in one piece: nothing of the first one follows.
                    headers = {REQUEST_ID: attempt.request_id}
                    answer = problem_response(problem_of(error), scope["path"], headers)
                    await answer(scope, receive, send)
                    return
                await send(begin)
            await send(message)

        scope = {**scope, "state": {**scope["state"], "attempt": attempt}}
        parts = self._runtime.parts
        with (NO_TRACING if parts is None else parts.tracing).continued(Headers(scope=scope)):
            await self._app(scope, receive, forward)

    async def _refused(self, attempt: Attempt, action: Action, name: str | None, kind: str) -> None:
        """Raises: AuditError."""
        if self._runtime.parts is not None:
            self._runtime.parts.metrics.count_operation(action, "refused")
        await record_attempt(self._runtime, attempt, action, "refused", domain=name, error=kind)


async def record_attempt(
    runtime: AlterRuntime,
    attempt: Attempt,
    action: Action,
    outcome: Outcome,
    *,
    domain: str | None = None,
    error: str | None = None,
) -> None:
    """Into the server's own log, if it has one, what changes no epoch. Raises: AuditError."""
    if runtime.audit is None:
        return
    entry = AuditEntry(
        actor=attempt.principal.name,
        request_id=attempt.request_id,
        action=action,
        domain=domain,
        epoch_before=runtime.epoch,
        epoch_after=runtime.epoch,
        digest=None,
        reason=None,
        outcome=outcome,
        error=error,
    )
    await asyncio.to_thread(runtime.audit.append, entry)


def _change(scope: Scope) -> tuple[Action | None, str | None]:
    """Which change a request asks for, and of what; a name that could not exist is left out."""
    path = route_path(scope)
    if scope["method"] == "POST" and (asked := _REQUESTS.fullmatch(path)) is not None:
        return _REQUEST_ACTIONS[asked["action"]], None
    match = _DOMAINS.fullmatch(path)
    if match is None:
        return None, None
    name = match["name"]
    return _ACTIONS.get(scope["method"]), name if name and is_domain_name(name) else None


def _problem_kind(body: bytes) -> str:
    try:
        return str(json.loads(body)["type"]).removeprefix(TYPE_PREFIX)
    except (ValueError, TypeError, KeyError):
        return "unknown"
