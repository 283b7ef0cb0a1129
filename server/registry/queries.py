"""What the registry asks of its tables, each within a transaction of the caller's."""

from __future__ import annotations

import dataclasses
import uuid
from datetime import datetime
from typing import cast

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from alter_core.errors import IdempotencyConflictError
from server.engine.base import InFlight

from .records import Action, Change, ChangeRequest, IdempotencyKey, Replica, ReplicaState
from .schema import ChangeRow, IdempotencyRow, ReplicaRow, database_now


def database_time(session: Session) -> datetime:
    """The database's clock."""
    return session.execute(select(database_now())).scalar_one()


def head_epoch(session: Session) -> int:
    """The epoch of the latest change, 0 before the first."""
    return session.scalar(select(func.max(ChangeRow.epoch))) or 0


def active_changes(session: Session, epoch: int) -> tuple[Change, ...]:
    """The activation of every domain that is active at an epoch, by name."""
    latest = (
        select(func.max(ChangeRow.epoch)).where(ChangeRow.epoch <= epoch).group_by(ChangeRow.domain)
    )
    rows = session.scalars(
        select(ChangeRow)
        .where(ChangeRow.epoch.in_(latest), ChangeRow.action == "activate")
        .order_by(ChangeRow.domain)
    )
    # Ordered here: the database's collation may sort '-' elsewhere.
    return tuple(sorted(map(change_of, rows), key=lambda change: change.domain))


def record_change(
    session: Session, request: ChangeRequest, *, epoch: int, slot: int, now: datetime
) -> Change:
    """Appends to the log."""
    row = ChangeRow(
        **dataclasses.asdict(request),
        epoch=epoch,
        slot=slot,
        operation_id=str(uuid.uuid4()),
        requested_at=now,
    )
    session.add(row)
    session.flush()
    return change_of(row)


def replayed_change(session: Session, idempotency: IdempotencyKey, now: datetime) -> Change | None:
    """The entry that a key stands for. Raises: IdempotencyConflictError."""
    row = session.get(IdempotencyRow, idempotency.key)
    if row is None or row.expires_at <= now:
        return None
    check_same_request(row.request_digest, idempotency)
    operation = select(ChangeRow).where(ChangeRow.operation_id == row.operation_id)
    return change_of(session.scalars(operation).one())


def check_same_request(request_digest: str | None, idempotency: IdempotencyKey) -> None:
    """Raises: IdempotencyConflictError if the key came with a request of another digest."""
    if request_digest != idempotency.request_digest:
        raise IdempotencyConflictError(
            "This idempotency key came before with another request",
            expected="the same request again, or a new key",
            got="another request",
            fix="Use a new key, e.g. a random UUID, for each new request.",
        )


def all_replicas(session: Session) -> tuple[Replica, ...]:
    """All servers that are listed, by id."""
    return tuple(
        Replica(
            replica_id=row.replica_id,
            applied_epoch=row.applied_epoch,
            state=cast(ReplicaState, row.state),
            last_error=row.last_error,
            lease_expires_at=row.lease_expires_at,
            lease_left_s=_seconds_left(row.lease_expires_at, now),
            seen_at=row.seen_at,
            silence_s=(now - row.seen_at).total_seconds(),
        )
        for row, now in session.execute(
            select(ReplicaRow, database_now()).order_by(ReplicaRow.replica_id)
        )
    )


def _seconds_left(expires_at: datetime | None, now: datetime) -> float:
    return 0.0 if expires_at is None else max(0.0, (expires_at - now).total_seconds())


def change_of(row: ChangeRow) -> Change:
    """A row as a record."""
    return Change(
        epoch=row.epoch,
        operation_id=row.operation_id,
        action=cast(Action, row.action),
        domain=row.domain,
        bundle_digest=row.bundle_digest,
        slot=row.slot,
        in_flight=cast(InFlight, row.in_flight),
        actor=row.actor,
        request_id=row.request_id,
        reason=row.reason,
        requested_at=row.requested_at,
    )
