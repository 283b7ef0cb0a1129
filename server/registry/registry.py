"""The desired state of a fleet: an ordered log of changes, and who has applied how much of it.

Every write holds the log's lock: appends exclusively, heartbeats shared (on SQLite all writes are
exclusive). Therefore epochs have no gaps, and a heartbeat is either seen by whoever looks at the
replicas after an append, or has itself seen that append. Times are the database's; the methods block, so
a coroutine calls them through `asyncio.to_thread`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from datetime import datetime, timedelta
from typing import Self

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from alter_core.errors import (
    ConfigError,
    DomainNotFoundError,
    EpochConflictError,
    OperationNotFoundError,
    RegistryMismatchError,
    RegistryUnavailableError,
)
from server.domain_rules import check_other_names, free_slot

from .database import DEFAULT_TIMEOUT_S, Database
from .queries import (
    active_changes,
    all_replicas,
    change_of,
    database_time,
    head_epoch,
    record_change,
    replayed_change,
)
from .records import (
    Appended,
    AppendOutcome,
    Barrier,
    Change,
    ChangeRequest,
    Deployment,
    DesiredState,
    Heartbeat,
    IdempotencyKey,
    Lease,
    Replica,
)
from .schema import (
    DEPLOYMENT_ID,
    ID_LENGTH,
    ChangeRow,
    DeploymentRow,
    IdempotencyRow,
    ReplicaRow,
    database_now,
)

logger = logging.getLogger(__name__)

DEFAULT_LEASE_S = 10.0
DEFAULT_CLOCK_MARGIN_S = 2.0
DEFAULT_POLL_S = 1.0
IDEMPOTENCY_KEY_LIFE = timedelta(days=1)
BeforeRecording = Callable[[int, Change | None], None]

REPLICA_MEMORY = timedelta(days=1)
"""For how long a replica that reports no more is listed."""


class Registry:
    """See the module. Methods raise RegistryUnavailableError if the database does not answer, and
    RegistryMismatchError if it has become that of another deployment."""

    def __init__(
        self,
        database: Database,
        deployment: Deployment,
        *,
        max_domains: int,
        lease_s: float = DEFAULT_LEASE_S,
        clock_margin_s: float = DEFAULT_CLOCK_MARGIN_S,
        poll_s: float = DEFAULT_POLL_S,
    ) -> None:
        """Use `open`. `clock_margin_s`: by how much longer a lease lasts for those who wait for its end than
        for its holder. `poll_s`: longest wait of `listen` between two looks.
        """
        self._database = database
        self._deployment = deployment
        self._max_domains = max_domains
        self._lease = timedelta(seconds=lease_s)
        self._margin = timedelta(seconds=clock_margin_s)
        self._poll_s = poll_s

    @classmethod
    def open(
        cls,
        url: str,
        deployment: Deployment,
        *,
        max_domains: int,
        lease_s: float = DEFAULT_LEASE_S,
        clock_margin_s: float = DEFAULT_CLOCK_MARGIN_S,
        poll_s: float = DEFAULT_POLL_S,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Self:
        """Connects, brings the schema up to date and joins the deployment, or founds it.

        Raises: ConfigError, RegistrySchemaError, RegistryMismatchError, RegistryUnavailableError.
        """
        if min(lease_s, clock_margin_s, poll_s, timeout_s) <= 0:
            raise ConfigError(
                "A time of the registry is out of range", expected="> 0", got="0 or less"
            )
        database = Database(url, timeout_s=timeout_s)
        try:
            database.upgrade()
            registry = cls(
                database,
                deployment,
                max_domains=max_domains,
                lease_s=lease_s,
                clock_margin_s=clock_margin_s,
                poll_s=poll_s,
            )
            registry._join()
        except BaseException:
            database.close()
            raise
        return registry

    @property
    def database(self) -> Database:
        """What else is kept beside the log, such as unlearning requests, uses the same connections."""
        return self._database

    @property
    def lease_s(self) -> float:
        """For how long a lease is granted."""
        return self._lease.total_seconds()

    def close(self) -> None:
        """Closes the connections."""
        self._database.close()

    def head(self) -> int:
        """The epoch of the latest change, 0 before the first."""
        with self._database.read() as session:
            return head_epoch(session)

    def append(
        self,
        request: ChangeRequest,
        *,
        expected_epoch: int | None = None,
        idempotency: IdempotencyKey | None = None,
        before_recording: BeforeRecording | None = None,
    ) -> Appended:
        """Records a change, which is durable on return. What is so already is not recorded again.

        With `expected_epoch` only if that is the head. A key that came with the same request before gets
        that request's entry, whatever has happened since; a request that was refused leaves no key.
        `before_recording` is called with the head and the domain's activation so far, once nothing but the
        database can refuse the change; what it raises refuses it.

        Raises: EpochConflictError, IdempotencyConflictError, DomainNotFoundError (revoking what is not
        active), DomainConflictError (the bundle is active under another name), NoFreeSlotError, and
        nothing is recorded; RegistryUnavailableError, and it may have been: repeat it with its key.
        """
        with self._database.write() as session:
            now, head = self._lock(session, is_exclusive=True)
            if idempotency is not None:
                session.execute(delete(IdempotencyRow).where(IdempotencyRow.expires_at <= now))
                earlier = replayed_change(session, idempotency, now)
                if earlier is not None:
                    return Appended(change=earlier, outcome="replayed", head=head)
            if expected_epoch is not None and expected_epoch != head:
                raise EpochConflictError(
                    "The domains have changed since; nothing was recorded",
                    expected=f"epoch {expected_epoch}",
                    got=f"epoch {head}",
                    fix="Read the current state and decide again.",
                )
            active = {change.domain: change for change in active_changes(session, head)}
            current = active.get(request.domain)
            outcome: AppendOutcome = "unchanged"
            if current is None or current.bundle_digest != request.bundle_digest:
                slot = self._slot(request, active)
                if before_recording is not None:
                    before_recording(head, current)
                current = record_change(session, request, epoch=head + 1, slot=slot, now=now)
                self._database.notify(session)
                outcome, head = "recorded", head + 1
            if idempotency is not None:
                session.add(
                    IdempotencyRow(
                        key=idempotency.key,
                        request_digest=idempotency.request_digest,
                        operation_id=current.operation_id,
                        expires_at=now + IDEMPOTENCY_KEY_LIFE,
                    )
                )
        return Appended(change=current, outcome=outcome, head=head)

    def replayed(self, idempotency: IdempotencyKey) -> Change | None:
        """The entry that a key stands for, None for a new one. Raises: IdempotencyConflictError."""
        with self._database.read() as session:
            return replayed_change(session, idempotency, database_time(session))

    def replaces(self, change: Change) -> bool:
        """True for the activation of a domain that was active already, with another bundle."""
        query = (
            select(ChangeRow.action)
            .where(ChangeRow.domain == change.domain, ChangeRow.epoch < change.epoch)
            .order_by(ChangeRow.epoch.desc())
            .limit(1)
        )
        with self._database.read() as session:
            return session.scalar(query) == "activate" and change.action == "activate"

    def operation(self, operation_id: str) -> Change:
        """Raises: OperationNotFoundError."""
        # PostgreSQL takes no NUL.
        is_possible = operation_id.isprintable() and len(operation_id) <= ID_LENGTH
        query = select(ChangeRow).where(ChangeRow.operation_id == operation_id)
        with self._database.read() as session:
            row = session.scalar(query) if is_possible else None
            if row is None:
                raise OperationNotFoundError(
                    "The log holds no such operation",
                    expected="an operation_id that an append has returned",
                    got=repr(operation_id[:ID_LENGTH]),
                )
            return change_of(row)

    def changes_since(self, epoch: int, *, limit: int | None = None) -> tuple[Change, ...]:
        """The changes after `epoch` in their order, at most `limit`."""
        query = select(ChangeRow).where(ChangeRow.epoch > epoch).order_by(ChangeRow.epoch)
        with self._database.read() as session:
            return tuple(map(change_of, session.scalars(query.limit(limit))))

    def desired_state(self, epoch: int | None = None) -> DesiredState:
        """What is to be applied at an epoch, by default the latest. Raises: EpochConflictError."""
        with self._database.read() as session:
            head = head_epoch(session)
            _check_epoch(epoch, head)
            epoch = head if epoch is None else epoch
            return DesiredState(epoch=epoch, domains=active_changes(session, epoch))

    def heartbeat(self, heartbeat: Heartbeat) -> Lease:
        """Reports a server, and asks for leave to generate.

        A server at the head gets a lease. One that is behind keeps its lease, or has it prolonged, until
        `lease_s` after the first change that it lacks was recorded, and gets no new one: so every change
        holds everywhere after that time, even if a server hangs.

        Raises: RegistryMismatchError also if the server has applied more than the log holds.
        """
        with self._database.write() as session:
            now, head = self._lock(session, is_exclusive=False)
            if heartbeat.applied_epoch > head:
                raise RegistryMismatchError(
                    "The registry has lost changes that this server has applied",
                    expected=f"epoch {heartbeat.applied_epoch} or later",
                    got=f"epoch {head}",
                    fix="Restore the registry's database, then restart the server.",
                )
            row = session.get(ReplicaRow, heartbeat.replica_id)
            ends = self._lease_end(session, heartbeat, row, head, now)
            if row is None:
                session.execute(delete(ReplicaRow).where(ReplicaRow.seen_at < now - REPLICA_MEMORY))
                row = ReplicaRow(replica_id=heartbeat.replica_id)
                session.add(row)
            row.base_model_fingerprint = self._deployment.base_model_fingerprint
            row.substrate_digest = self._deployment.substrate_digest
            row.applied_epoch = heartbeat.applied_epoch
            row.state = heartbeat.state
            row.last_error = heartbeat.last_error
            row.seen_at = now
            if heartbeat.state != "serving":
                row.lease_expires_at = None
            elif ends is not None:
                row.lease_expires_at = max(ends + self._margin, row.lease_expires_at or now)
        duration_s = 0.0 if ends is None else (ends - now).total_seconds()
        return Lease(head=head, duration_s=max(0.0, duration_s))

    def release(self, replica_id: str) -> None:
        """Takes a server off the list. It must have stopped generating, for good."""
        with self._database.write() as session:
            self._lock(session, is_exclusive=False)
            session.execute(delete(ReplicaRow).where(ReplicaRow.replica_id == replica_id))

    def replicas(self) -> tuple[Replica, ...]:
        """All servers that have reported within a day, by id."""
        with self._database.read() as session:
            return all_replicas(session)

    def barrier(self, epoch: int) -> Barrier:
        """Whether an epoch holds wherever tokens may be generated. Raises: EpochConflictError."""
        # Exclusive: no heartbeat may be about to prolong a lease that is found to have run out.
        with self._database.write() as session:
            _, head = self._lock(session, is_exclusive=True)
            _check_epoch(epoch, head)
            replicas = all_replicas(session)
        lagging = tuple(r for r in replicas if r.holds_lease and r.applied_epoch < epoch)
        return Barrier(epoch=epoch, head=head, lagging=lagging)

    async def listen(self, after: int) -> AsyncIterator[int]:
        """Yields the head whenever it has risen above `after` and what was yielded before.

        A notification makes it look at once; without one it looks every `poll_s`. While the database does
        not answer it goes on trying: that the lease runs out is for the heartbeat to notice.
        """
        is_down = False
        async with self._database.listener() as listener:
            while True:
                await listener.connect()
                try:
                    head = await asyncio.to_thread(self.head)
                except RegistryUnavailableError as error:
                    if not is_down:
                        logger.warning("%s", error)
                    is_down = True
                else:
                    is_down = False
                    if head > after:
                        after = head
                        yield head
                await listener.wait(self._poll_s)

    def _join(self) -> None:
        with self._database.write() as session:
            self._database.lock(session, is_exclusive=True)
            if session.scalar(select(DeploymentRow.id)) is None:
                founded = DeploymentRow(
                    id=DEPLOYMENT_ID,
                    base_model_fingerprint=self._deployment.base_model_fingerprint,
                    substrate_digest=self._deployment.substrate_digest,
                    created_at=database_time(session),
                )
                session.add(founded)
                session.flush()
            self._check_deployment(session.scalar(select(DeploymentRow)))

    def _lock(self, session: Session, *, is_exclusive: bool) -> tuple[datetime, int]:
        """Waits for the log; the time and its head after that. Raises: RegistryMismatchError."""
        self._database.lock(session, is_exclusive=is_exclusive)
        # One statement: others wait meanwhile.
        head = select(func.max(ChangeRow.epoch)).scalar_subquery()
        found = session.execute(select(DeploymentRow, database_now(), head)).one_or_none()
        self._check_deployment(None if found is None else found[0])
        assert found is not None  # or it would have been refused
        return found[1], found[2] or 0

    def _check_deployment(self, row: DeploymentRow | None) -> None:
        """Raises: RegistryMismatchError."""
        found = None
        if row is not None:
            found = Deployment(
                base_model_fingerprint=row.base_model_fingerprint,
                substrate_digest=row.substrate_digest,
            )
        if found != self._deployment:
            raise RegistryMismatchError(
                "The registry belongs to another base model or substrate",
                expected=_describe(self._deployment),
                got="no deployment" if found is None else _describe(found),
                fix="Give each base model and substrate a registry of its own.",
            )

    def _slot(self, request: ChangeRequest, active: dict[str, Change]) -> int:
        current = active.get(request.domain)
        if request.action == "revoke":
            if current is None:
                raise DomainNotFoundError(
                    f"No active domain is named {request.domain!r}",
                    expected=f"one of: {', '.join(sorted(active)) or '(none is active)'}",
                    got=repr(request.domain),
                    fix="List the active ones with `alter domains list`.",
                )
            return current.slot
        names = {str(change.bundle_digest): change.domain for change in active.values()}
        check_other_names(str(request.bundle_digest), names)
        if current is not None:
            return current.slot
        return free_slot({change.slot for change in active.values()}, self._max_domains)

    def _lease_end(
        self,
        session: Session,
        heartbeat: Heartbeat,
        row: ReplicaRow | None,
        head: int,
        now: datetime,
    ) -> datetime | None:
        if heartbeat.state != "serving":
            return None
        if heartbeat.applied_epoch == head:
            return now + self._lease
        if (
            row is None
            or row.lease_expires_at is None
            or row.lease_expires_at - self._margin <= now
            or row.applied_epoch > heartbeat.applied_epoch
        ):
            return None
        missing = session.get_one(ChangeRow, heartbeat.applied_epoch + 1)
        return min(now, missing.requested_at) + self._lease


def _describe(deployment: Deployment) -> str:
    return (
        f"base model {deployment.base_model_fingerprint[:16]}, "
        f"substrate {deployment.substrate_digest}"
    )


def _check_epoch(epoch: int | None, head: int) -> None:
    if epoch is not None and not 0 <= epoch <= head:
        raise EpochConflictError(
            "The log does not reach that epoch", expected=f"0 to {head}", got=str(epoch)
        )
