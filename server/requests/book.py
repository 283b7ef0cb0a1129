"""Unlearning requests in the registry's database. Every method is one transaction, durable on return."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from alter_core.errors import (
    RequestConflictError,
    RequestNotFoundError,
)
from server.registry import IdempotencyKey
from server.registry.database import Database
from server.registry.queries import (
    active_changes,
    check_same_request,
    database_time,
    head_epoch,
)
from server.registry.schema import ID_LENGTH, UnlearningRequestRow

from .records import (
    ENDED,
    STATES,
    AskedFor,
    Progress,
    State,
    UnlearningRequest,
)

CANCELLABLE: frozenset[State] = frozenset(STATES) - ENDED - {"activating"}
MAX_LISTED = 200


class RequestBook:
    """See the module. All methods raise RegistryUnavailableError if the database does not answer."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def replayed(self, idempotency: IdempotencyKey) -> UnlearningRequest | None:
        """The request that a key stands for, None for a new one. Raises: IdempotencyConflictError."""
        with self._database.read() as session:
            return _replayed(session, idempotency)

    def create(
        self, asked: AskedFor, idempotency: IdempotencyKey | None = None
    ) -> tuple[UnlearningRequest, bool]:
        """Records a request as queued; True with the earlier one if the key came before.

        Raises: RequestConflictError if another one is under way for the domain, or shares rows with it, or if
        rows of it are forgotten already; IdempotencyConflictError. Nothing is recorded then.
        """
        with self._database.write() as session:
            self._database.lock(session, is_exclusive=True)
            if idempotency is not None and (earlier := _replayed(session, idempotency)) is not None:
                return earlier, True
            _check_others(session, asked)
            now = database_time(session)
            fields = dataclasses.asdict(asked) | {"row_digests": list(asked.row_digests)}
            row = UnlearningRequestRow(
                **fields,
                state="queued",
                allow_unknown=False,
                num_attempts=0,
                figures={},
                created_at=now,
                updated_at=now,
                idempotency_key=None if idempotency is None else idempotency.key,
                request_digest=None if idempotency is None else idempotency.request_digest,
            )
            session.add(row)
            session.flush()
            return _request_of(row), False

    def get(self, request_id: str) -> UnlearningRequest:
        """Raises: RequestNotFoundError."""
        with self._database.read() as session:
            return _request_of(_row(session, request_id))

    def list(self) -> tuple[UnlearningRequest, ...]:
        """The newest first, MAX_LISTED at most."""
        query = select(UnlearningRequestRow).order_by(UnlearningRequestRow.created_at.desc())
        with self._database.read() as session:
            return tuple(map(_request_of, session.scalars(query.limit(MAX_LISTED))))

    def under_way(self, workspace: str) -> tuple[UnlearningRequest, ...]:
        """Those of a workspace that have not ended, or whose text is still there; the oldest first."""
        query = (
            select(UnlearningRequestRow)
            .where(
                UnlearningRequestRow.workspace == workspace,
                UnlearningRequestRow.state.not_in(ENDED)
                | UnlearningRequestRow.text_deleted_at.is_(None),
            )
            .order_by(UnlearningRequestRow.created_at)
        )
        with self._database.read() as session:
            return tuple(map(_request_of, session.scalars(query)))

    def advance(
        self, request: UnlearningRequest, state: State | None = None, **fields: Any
    ) -> UnlearningRequest:
        """Notes what has become of a request that is still as it was when `request` was read.

        Raises: RequestConflictError if it is in another state, or somebody wants its end meanwhile.
        """
        with self._database.write() as session:
            self._database.lock(session, is_exclusive=True)
            row = _row(session, request.id)
            found = (row.state, row.cancelled_by)
            if found != (request.state, request.cancelled_by):
                raise _moved_on(row)
            row.state = state or row.state
            for name, value in fields.items():
                is_progress = isinstance(value, Progress)
                setattr(row, name, dataclasses.asdict(value) if is_progress else value)
            row.updated_at = database_time(session)
            session.flush()
            return _request_of(row)

    def text_deleted(self, request: UnlearningRequest) -> UnlearningRequest:
        """Notes that nothing is left of what was uploaded for it."""
        with self._database.write() as session:
            row = _row(session, request.id)
            row.text_deleted_at = row.text_deleted_at or database_time(session)
            session.flush()
            return _request_of(row)

    def approve(self, request_id: str, actor: str) -> UnlearningRequest:
        """Answers its question with yes. Raises: RequestNotFoundError, RequestConflictError."""

        def change(row: UnlearningRequestRow) -> None:
            row.approved_by = row.approved_by or actor

        return self._change(request_id, frozenset(("awaiting-approval",)), change, "approved")

    def cancel(self, request_id: str, actor: str) -> UnlearningRequest:
        """Asks for its end, which its own server brings about.

        Raises: RequestNotFoundError, RequestConflictError.
        """

        def change(row: UnlearningRequestRow) -> None:
            row.cancelled_by = row.cancelled_by or actor

        return self._change(request_id, CANCELLABLE, change, "cancelled")

    def _change(
        self, request_id: str, states: Collection[State], change: Any, done: str
    ) -> UnlearningRequest:
        with self._database.write() as session:
            self._database.lock(session, is_exclusive=True)
            row = _row(session, request_id)
            if row.state not in states:
                raise RequestConflictError(
                    f"An unlearning request that is {row.state} cannot be {done}",
                    expected=" or ".join(sorted(states)),
                    got=row.state,
                    fix="Revoke the domain with `alter domains revoke` once it is active."
                    if row.state in ("activating", "active")
                    else "Read its state again.",
                )
            change(row)
            row.updated_at = database_time(session)
            session.flush()
            return _request_of(row)


def _replayed(session: Session, idempotency: IdempotencyKey) -> UnlearningRequest | None:
    row = session.scalar(
        select(UnlearningRequestRow).where(UnlearningRequestRow.idempotency_key == idempotency.key)
    )
    if row is None:
        return None
    check_same_request(row.request_digest, idempotency)
    return _request_of(row)


def _check_others(session: Session, asked: AskedFor) -> None:
    """Raises: RequestConflictError."""
    active = {change.domain: change for change in active_changes(session, head_epoch(session))}
    digests = set(asked.row_digests)
    for row in session.scalars(
        select(UnlearningRequestRow).where(
            UnlearningRequestRow.state.not_in(("failed", "cancelled"))
        )
    ):
        is_under_way = row.state not in ENDED
        if is_under_way and row.domain == asked.domain:
            raise RequestConflictError(
                f"An unlearning request for the domain {row.domain!r} is under way",
                expected="one at a time for each domain",
                got=f"request {row.id}, {row.state}",
                fix="Wait for it, cancel it, or choose another name.",
            )
        applied = active.get(row.domain)
        is_forgotten = applied is not None and applied.bundle_digest == row.bundle_digest
        if not (is_under_way or is_forgotten) or row.domain == asked.domain:
            continue
        if shared := len(digests & set(row.row_digests)):
            raise RequestConflictError(
                f"The domain {row.domain!r} already covers rows of this request",
                expected="rows of no other domain",
                got=f"{shared} of {len(digests)} in request {row.id}, {row.state}",
                fix=f"Leave them out, or ask for the domain {row.domain!r} with all rows.",
            )


def _row(session: Session, request_id: str) -> UnlearningRequestRow:
    # PostgreSQL takes no NUL.
    is_possible = request_id.isprintable() and len(request_id) <= ID_LENGTH
    row = session.get(UnlearningRequestRow, request_id) if is_possible else None
    if row is None:
        raise RequestNotFoundError(
            "There is no such unlearning request",
            expected="the id of one",
            got=repr(request_id[:ID_LENGTH]),
            fix="List them with `alter requests list`.",
        )
    return row


def _moved_on(row: UnlearningRequestRow) -> RequestConflictError:
    return RequestConflictError(
        "The unlearning request has moved on",
        expected="the state that was read",
        got=row.state + (", to be cancelled" if row.cancelled_by else ""),
        fix="Read it again.",
    )


def _request_of(row: UnlearningRequestRow) -> UnlearningRequest:
    columns: dict[str, Any] = {
        field.name: getattr(row, field.name) for field in dataclasses.fields(UnlearningRequest)
    }
    columns["row_digests"] = tuple(row.row_digests)
    columns["progress"] = None if row.progress is None else Progress(**row.progress)
    return UnlearningRequest(**columns)
