"""What goes into the registry and comes out of it."""

from __future__ import annotations

import dataclasses
import re
from datetime import datetime
from typing import Literal, get_args

from alter_core.errors import ChangeRequestError
from server.domain_rules import check_domain_name
from server.engine.base import InFlight

from .schema import (
    ACTOR_LENGTH,
    ERROR_LENGTH,
    ID_LENGTH,
    KEY_LENGTH,
    REASON_LENGTH,
    REQUEST_ID_LENGTH,
)

Action = Literal["activate", "revoke"]
ReplicaState = Literal["starting", "serving", "failed"]
"""Only a serving one may generate; the others have stopped before they say so, and hold no lease."""
AppendOutcome = Literal["recorded", "unchanged", "replayed"]

DIGEST_PATTERN = r"sha256:[0-9a-f]{64}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Deployment:
    """What every server of one registry serves."""

    base_model_fingerprint: str
    """Of `BaseModelInfo`."""
    substrate_digest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChangeRequest:
    """A change that somebody asks for. Raises: ChangeRequestError, DomainNameError."""

    action: Action
    domain: str
    bundle_digest: str | None = None
    """For an activation, and only for that."""
    in_flight: InFlight = "recompute"
    actor: str
    """Who asked: a name or a token's id, never a token."""
    request_id: str | None = None
    reason: str | None = None
    """A case number or the like, one line. Kept for ever: never the text that is to be forgotten."""

    def __post_init__(self) -> None:
        check_domain_name(self.domain)
        _check_choice("action", self.action, get_args(Action))
        _check_choice("in_flight", self.in_flight, get_args(InFlight))
        if self.action == "activate":
            _check_digest("bundle_digest", self.bundle_digest or "")
        elif self.bundle_digest is not None:
            raise ChangeRequestError("A revocation names no bundle", expected="none", got="one")
        _check_line("actor", self.actor, ACTOR_LENGTH)
        if self.request_id is not None:
            _check_line("request_id", self.request_id, REQUEST_ID_LENGTH)
        if self.reason is not None:
            _check_line("reason", self.reason, REASON_LENGTH)


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdempotencyKey:
    """Makes an append that is repeated with the same request happen once."""

    key: str
    request_digest: str
    """Over all that makes the request what it is, the actor included."""

    def __post_init__(self) -> None:
        _check_line("idempotency key", self.key, KEY_LENGTH)
        _check_digest("request_digest", self.request_digest)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One entry of the log."""

    epoch: int
    """From 1, without gaps."""
    operation_id: str
    """Of this entry and no other, also in a database that was set back to an older copy."""
    action: Action
    domain: str
    bundle_digest: str | None
    slot: int
    in_flight: InFlight
    actor: str
    request_id: str | None
    reason: str | None
    requested_at: datetime


@dataclasses.dataclass(frozen=True, kw_only=True)
class Appended:
    """What became of a request."""

    change: Change
    """The entry that stands for it; an earlier one unless the outcome is `recorded`."""
    outcome: AppendOutcome
    head: int
    """The epoch of the log now."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DesiredState:
    """What every server is to apply at an epoch."""

    epoch: int
    domains: tuple[Change, ...]
    """The activation of every active domain, by name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """What a server says of itself. Raises: ChangeRequestError."""

    replica_id: str
    """New at every start of a process, e.g. a UUID: two that share one would hide each other."""
    applied_epoch: int
    state: ReplicaState
    last_error: str | None = None
    """The kind of a problem, such as `bundle-tampered`; no text."""

    def __post_init__(self) -> None:
        _check_line("replica_id", self.replica_id, ID_LENGTH)
        _check_choice("state", self.state, get_args(ReplicaState))
        if self.applied_epoch < 0:
            raise ChangeRequestError(
                "applied_epoch is out of range", expected=">= 0", got=str(self.applied_epoch)
            )
        if self.last_error is not None and not re.fullmatch(
            rf"[a-z-]{{1,{ERROR_LENGTH}}}", self.last_error
        ):
            raise ChangeRequestError(
                "last_error is not the kind of a problem", expected="such as `bundle-tampered`"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lease:
    """The answer to a heartbeat."""

    head: int
    """The epoch to apply."""
    duration_s: float
    """From the moment *before* the heartbeat was sent, on a monotonic clock, generation is allowed for this
    long; 0: not at all on account of this heartbeat. An earlier lease stays what it was."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replica:
    """One server as it last reported."""

    replica_id: str
    applied_epoch: int
    state: ReplicaState
    last_error: str | None
    lease_expires_at: datetime | None
    lease_left_s: float
    """By the database's clock, with the margin that others wait."""
    seen_at: datetime
    silence_s: float
    """Since it last reported."""

    @property
    def holds_lease(self) -> bool:
        """True if it may still be generating."""
        return self.lease_left_s > 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Barrier:
    """Whether an epoch holds in the whole fleet."""

    epoch: int
    head: int
    lagging: tuple[Replica, ...]
    """Those that hold a lease and have not applied it."""

    @property
    def is_passed(self) -> bool:
        """True if nobody can generate under an earlier epoch; once true it stays so."""
        return not self.lagging


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ChangeRequestError(
            f"{name} is unknown", expected=" or ".join(choices), got=repr(value[:ID_LENGTH])
        )


def _check_digest(name: str, value: str) -> None:
    if re.fullmatch(DIGEST_PATTERN, value) is None:
        raise ChangeRequestError(
            f"{name} is not a digest", expected="sha256: and 64 hexadecimal digits"
        )


def _check_line(name: str, value: str, max_length: int) -> None:
    # What came is not shown: it might hold what must not be kept.
    if not 0 < len(value) <= max_length or not value.isprintable():
        raise ChangeRequestError(
            f"{name} is not one line of text",
            expected=f"1 to {max_length} printable characters",
            got=f"{len(value)} characters",
        )
