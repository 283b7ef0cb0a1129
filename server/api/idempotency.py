"""`Idempotency-Key`: a repeated request is answered like the first one, and done once."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from http import HTTPStatus

from starlette.requests import Request
from starlette.responses import Response

from .attempts import attempt_of
from .problems import ProblemError

MAX_KEYS = 1024
MAX_KEY_LENGTH = 255
REPLAYED = "Idempotency-Replayed"


@dataclasses.dataclass(frozen=True)
class _Entry:
    fingerprint: bytes
    task: asyncio.Task[Response]


class IdempotencyStore:
    """Answers by key, in memory; the oldest finished ones go first when there are too many.

    Only successes are kept: a request that was refused has done nothing and may be tried again with
    its key. A repetition that comes while the first is still running waits for the same answer.
    """

    def __init__(self, max_keys: int = MAX_KEYS) -> None:
        self._max_keys = max_keys
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    async def run(
        self, request: Request, key: str | None, perform: Callable[[], Awaitable[Response]]
    ) -> Response:
        """Performs the request, or replays the answer that its key has already.

        Raises: ProblemError 400 for an unusable key, 422 for a key that came with another request.
        """
        if key is None:
            return await perform()
        _check_key(key)
        # Each actor has keys of its own: nobody is answered for what another has done.
        key = f"{attempt_of(request).principal.name}\n{key}"
        fingerprint = await _fingerprint(request)
        entry = self._entries.get(key)
        if entry is None:
            return await self._first(key, fingerprint, perform)
        if entry.fingerprint != fingerprint:
            raise ProblemError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "idempotency-key-reused",
                "The idempotency key belongs to another request",
                "This Idempotency-Key came before with another method, path or body",
                expected="the same request again, or a new key",
                got="another request",
                fix="Use a new key, e.g. a random UUID, for each new request.",
            )
        return _replay(await asyncio.shield(entry.task))

    async def _first(
        self, key: str, fingerprint: bytes, perform: Callable[[], Awaitable[Response]]
    ) -> Response:
        async def run() -> Response:
            return await perform()

        task = asyncio.create_task(run())
        self._entries[key] = _Entry(fingerprint, task)
        task.add_done_callback(lambda done: self._finish(key, done))
        # Shielded: the answer is there for the repetition of a client that was cut off.
        return await asyncio.shield(task)

    def _finish(self, key: str, task: asyncio.Task[Response]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._entries.pop(key, None)
        finished = [k for k, entry in self._entries.items() if entry.task.done()]
        for old in finished[: max(0, len(self._entries) - self._max_keys)]:
            del self._entries[old]


def _check_key(key: str) -> None:
    if not 0 < len(key) <= MAX_KEY_LENGTH:
        raise ProblemError(
            HTTPStatus.BAD_REQUEST,
            "malformed-header",
            "A header is malformed",
            "Idempotency-Key has an unusable length",
            expected=f"1 to {MAX_KEY_LENGTH} characters",
            got=f"{len(key)}",
            fix="Use a random UUID.",
        )


async def _fingerprint(request: Request) -> bytes:
    head = f"{request.method}\n{request.url.path}\n".encode()
    return hashlib.sha256(head + await request.body()).digest()


def _replay(answer: Response) -> Response:
    headers = {k: v for k, v in answer.headers.items() if k != "content-length"}
    return Response(answer.body, answer.status_code, headers | {REPLAYED: "true"})
