"""`Prefer: wait=N` (RFC 7240): how long an answer may take rather than be 202."""

from __future__ import annotations

import re
from collections.abc import Iterable

MAX_WAIT_S = 60
APPLIED = "Preference-Applied"

_WAIT = re.compile(r'wait\s*=\s*"?(\d{1,9})"?\s*(?:;.*)?', re.IGNORECASE)


def wait_of(headers: Iterable[str]) -> int | None:
    """Seconds, at most MAX_WAIT_S; None if none is preferred. What cannot be understood is passed over, as
    the RFC demands; of several the first counts."""
    for header in headers:
        for preference in header.split(","):
            if (match := _WAIT.fullmatch(preference.strip())) is not None:
                return min(int(match[1]), MAX_WAIT_S)
    return None
