"""`Idempotency-Key`: a repeated request is done once, on whichever server of the fleet it arrives."""

from __future__ import annotations

import hashlib
from http import HTTPStatus

from starlette.requests import Request

from server.registry import IdempotencyKey

from .attempts import attempt_of
from .problems import ProblemError

MAX_KEY_LENGTH = 255
REPLAYED = "Idempotency-Replayed"


async def idempotency_of(request: Request, key: str | None) -> IdempotencyKey | None:
    """What the registry keeps of a key: digests, so that each actor has keys of its own.

    Raises: ProblemError 400 for an unusable key.
    """
    if key is None:
        return None
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
    actor = attempt_of(request).principal.name
    head = f"{request.method}\n{request.url.path}\n".encode()
    return IdempotencyKey(
        key=_digest(f"{actor}\n{key}".encode()),
        request_digest=_digest(head + await request.body()),
    )


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
