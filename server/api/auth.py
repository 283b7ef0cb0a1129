"""Bearer authentication of `/admin`, and what each role may do. vLLM's `--api-key` does not cover it."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from server.settings import token_digest
from server.tokens import Principal, Role

from .problems import ProblemError, problem_response
from .runtime import AlterRuntime

logger = logging.getLogger(__name__)

MAX_FAILURES = 10
"""Wrong tokens from one address within the window; then it has to wait."""
FAILURE_WINDOW_S = 60.0
MAX_ADDRESSES = 4096

ADMIN = Principal(name="admin", role="admin")
"""Who has the single admin token."""

_READING = frozenset(("GET", "HEAD", "OPTIONS"))
_REALM = 'Bearer realm="alter-admin"'
_HOW_TO_SET = (
    "Start the server with ALTER_ADMIN_TOKEN, ALTER_ADMIN_TOKEN_FILE or --alter-admin-token-file; "
    "make a token with: openssl rand -hex 32. For tokens with roles, see --alter-tokens-file"
)


class BearerAuth:
    """Pure ASGI: lets nothing through without a token that holds, whatever the route.

    `failures` counts wrong ones, of all doors together.
    """

    def __init__(self, app: ASGIApp, runtime: AlterRuntime, failures: FailureLimit) -> None:
        self._app = app
        self._runtime = runtime
        self._failures = failures

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "no websocket routes under /admin"
        try:
            principal = self._identify(scope)
        except ProblemError as error:
            response = problem_response(error.problem, scope["path"], error.headers)
            await response(scope, receive, send)
            return
        state = {**scope.get("state", {}), "principal": principal}
        await self._app({**scope, "state": state}, receive, send)

    def _identify(self, scope: Scope) -> Principal:
        """Raises: ProblemError 403 if no token is configured, 429 after too many wrong ones, 401 if it
        is missing, unknown or expired."""
        if self._runtime.admin_token_sha256 is None and self._runtime.tokens is None:
            raise ProblemError(
                HTTPStatus.FORBIDDEN,
                "admin-closed",
                "The admin side is closed",
                "This server was started without an admin token, so nobody may use /admin",
                expected="an admin token in the server's configuration",
                got="none",
                fix=_HOW_TO_SET,
            )
        presented = _bearer(Headers(scope=scope))
        if presented is None:
            raise _unauthorized("no bearer token", _REALM)
        address = client_network(scope)
        wait_s = self._failures.wait_s(address)
        if wait_s > 0:
            raise _too_many(wait_s)
        principal = self._find(presented)
        if principal is None:
            self._failures.record(address)
            raise _unauthorized("another token", f'{_REALM}, error="invalid_token"')
        return principal

    def _find(self, presented: str) -> Principal | None:
        tokens, single = self._runtime.tokens, self._runtime.admin_token_sha256
        # Both are looked at, whichever holds.
        found = None if tokens is None else tokens.find(presented)
        is_single = single is not None and hmac.compare_digest(token_digest(presented), single)
        return ADMIN if is_single else found


class RoleGuard:
    """Pure ASGI: lets a viewer read, and those above change things too."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        principal: Principal = scope["state"]["principal"]
        needed = needed_role(scope["method"])
        if principal.has(needed):
            await self._app(scope, receive, send)
            return
        error = ProblemError(
            HTTPStatus.FORBIDDEN,
            "role-too-low",
            "The token's role does not allow this",
            "This request changes something, and the token may only read",
            expected=f"a token of the role {needed}, or of a higher one",
            got=f"the role {principal.role}",
            fix="Ask who runs the server for another token.",
        )
        await problem_response(error.problem, scope["path"])(scope, receive, send)


def needed_role(method: str) -> Role:
    """The lowest role that may send such a request."""
    return "viewer" if method in _READING else "operator"


class FailureLimit:
    """Counts failures by address over a sliding window; knows a bounded number of addresses."""

    def __init__(
        self,
        max_failures: int = MAX_FAILURES,
        window_s: float = FAILURE_WINDOW_S,
        *,
        max_addresses: int = MAX_ADDRESSES,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_failures = max_failures
        self._window_s = window_s
        self._max_addresses = max_addresses
        self._now = now
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """How long `address` has to wait; 0 if it may try."""
        times = self._failures.get(address)
        if times is None or len(times) < self._max_failures:
            return 0.0
        return max(0.0, times[0] + self._window_s - self._now())

    def record(self, address: str) -> None:
        """Counts one failure, and forgets whoever has not failed for longest if there are too many."""
        times = self._failures.setdefault(address, deque(maxlen=self._max_failures))
        times.append(self._now())
        self._failures.move_to_end(address)
        if len(self._failures) > self._max_addresses:
            self._failures.popitem(last=False)
        if self.wait_s(address) > 0:
            logger.warning("Too many wrong tokens from %s; it has to wait", address)


def client_network(scope: Scope) -> str:
    """The address that a request comes from; of IPv6 the /64, which is what one client has."""
    host = scope["client"][0] if scope.get("client") else ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return "unknown"
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((int(address), 64), strict=False))


def _bearer(headers: Headers) -> str | None:
    values = headers.getlist("authorization")
    scheme, _, presented = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    return presented.strip() or None if scheme.lower() == "bearer" else None


def _unauthorized(got: str, challenge: str) -> ProblemError:
    return ProblemError(
        HTTPStatus.UNAUTHORIZED,
        "unauthorized",
        "The admin token is missing or wrong",
        "This route needs an admin token",
        expected="Authorization: Bearer with a token that this server knows",
        got=got,
        fix="Send the token; the command line takes it from ALTER_ADMIN_TOKEN or --token-file.",
        headers={"WWW-Authenticate": challenge},
    )


def _too_many(wait_s: float) -> ProblemError:
    return ProblemError(
        HTTPStatus.TOO_MANY_REQUESTS,
        "too-many-failures",
        "Too many wrong tokens",
        "Too many wrong tokens came from this address",
        expected=f"fewer than {MAX_FAILURES} within {FAILURE_WINDOW_S:.0f} s",
        got="more",
        fix="Wait as long as Retry-After says, then send the right token.",
        headers={"Retry-After": str(math.ceil(wait_s))},
    )
