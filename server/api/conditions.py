"""Conditional requests. The entity tag of everything under `/admin` is the epoch.

If-Match: "4"       only if nothing has changed since epoch 4
If-Match: *         only if the named domain is active
If-None-Match: *    only if it is not
"""

from __future__ import annotations

import re
from http import HTTPStatus

from server.domain_rules import Precondition

from .problems import ProblemError

_TAG = re.compile(r'(?P<weak>W/)?"(?P<value>[^"]*)"')


def etag(epoch: int) -> str:
    """`"4"`."""
    return f'"{epoch}"'


def precondition(if_match: str | None, if_none_match: str | None) -> Precondition | None:
    """What the two headers demand, to be called under the service's lock; None if they are absent.

    Raises: ProblemError 400 for a header that does not parse. The result raises ProblemError 412.
    """
    if if_match is None and if_none_match is None:
        return None
    wanted = _parse("If-Match", "*" if if_match is None else if_match)
    unwanted = _parse("If-None-Match", "*" if if_none_match is None else if_none_match)

    def check(epoch: int, is_active: bool) -> None:
        # If-Match compares strongly: a weak tag never matches.
        if if_match is not None and not _matches(wanted, epoch, is_active, is_strong=True):
            raise _failed("If-Match", if_match, epoch, is_active)
        if if_none_match is not None and _matches(unwanted, epoch, is_active, is_strong=False):
            raise _failed("If-None-Match", if_none_match, epoch, is_active)

    return check


def _parse(header: str, text: str) -> list[tuple[bool, str]] | None:
    """(is weak, value) of every tag; None for `*`."""
    if text.strip() == "*":
        return None
    tags = []
    for part in text.split(","):
        match = _TAG.fullmatch(part.strip())
        if match is None:
            raise ProblemError(
                HTTPStatus.BAD_REQUEST,
                "malformed-header",
                "A header is malformed",
                f"{header} is not a list of entity tags",
                expected='* or quoted epochs such as "4"',
                got=part.strip()[:80],
                fix="Send the ETag of an earlier answer as it came.",
            )
        tags.append((match["weak"] is not None, match["value"]))
    return tags


def _matches(
    tags: list[tuple[bool, str]] | None, epoch: int, is_active: bool, *, is_strong: bool
) -> bool:
    if tags is None:
        return is_active
    return any(value == str(epoch) and not (is_strong and weak) for weak, value in tags)


def _failed(header: str, value: str, epoch: int, is_active: bool) -> ProblemError:
    return ProblemError(
        HTTPStatus.PRECONDITION_FAILED,
        "precondition-failed",
        "A condition of the request does not hold",
        f"{header} does not hold; nothing has changed",
        expected=f"{header}: {value}",
        got=f"epoch {epoch}, and the name is {'active' if is_active else 'not active'}",
        fix="Read the current state, decide again, and send its ETag.",
        headers={"ETag": etag(epoch)},
    )
