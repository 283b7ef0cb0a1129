"""Changes of what the fleet is to apply: asked for here, recorded in the registry, followed until they hold.

A change is checked and its bundle stored before it is recorded; once recorded it is durable, and every
server applies it. An operation is one entry of the log, and its state is worked out from what the servers
report:

    pending   recorded; no server applies it yet
    applying  some do; others may still generate without it
    active    whoever can generate applies it
    failed    nobody applies it, and a server has said that it cannot: nothing is generated. It is tried
              again, and becomes active if that works; revoking or replacing the domain takes it back
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Literal

from prometheus_client import CollectorRegistry

from alter_core.bundle import Bundle
from alter_core.errors import (
    AuditError,
    BundleFormatError,
    DomainNotFoundError,
    EpochConflictError,
    RegistryMismatchError,
    RegistryUnavailableError,
)
from alter_core.substrate import ForgetExpert, Substrate
from server import audit
from server.audit import AuditEntry, AuditLog, Cause
from server.domain_rules import Precondition, check_domain_name, is_domain_name
from server.domains import error_kind
from server.engine.base import InFlight
from server.metrics import AlterMetrics
from server.reconciler import Reconciler
from server.registry import (
    Appended,
    BundleStore,
    Change,
    ChangeRequest,
    IdempotencyKey,
    Registry,
    Replica,
)
from server.registry.records import Action
from server.tracing import NO_TRACING, Tracing

logger = logging.getLogger(__name__)

OperationState = Literal["pending", "applying", "active", "failed"]
Outcome = Literal["created", "replaced", "unchanged", "revoked"]

POLL_S = 0.02
"""Between two looks at the other servers while somebody waits."""
LONG_POLL_S = 0.25
"""The same while this server, which says when it has done something, is not through itself."""
FAILURE_MEMORY_S = 60.0
"""A server that said that it cannot apply a change, and no more since, may be gone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operation:
    """One change, and how far it has come."""

    change: Change
    epoch: int
    """Of the log when it was recorded; higher than the change's if that was there already."""
    outcome: Outcome
    state: OperationState
    lagging: tuple[Replica, ...]
    """Servers that may still generate without it."""
    error: str | None
    """The kind of the problem of a server that cannot apply it."""
    is_replayed: bool = False
    """The answer to a repetition."""

    @property
    def is_settled(self) -> bool:
        """True for what is not waited for any longer."""
        return self.state in ("active", "failed")


class _Attempt:
    """What the audit log will say of one attempt; the rest of it becomes known on the way."""

    def __init__(self, action: Action, name: str, cause: Cause | None, epoch: int) -> None:
        self.action = action
        self.name = name
        self.cause = cause or Cause()
        self.epoch_before = epoch
        self.epoch_after: int | None = None
        self.digest: str | None = None
        self.replaces = False
        self.has_begun = False

    @property
    def outcome(self) -> Outcome:
        """Of a change that was recorded."""
        if self.action == "revoke":
            return "revoked"
        return "replaced" if self.replaces else "created"

    def request(
        self, *, bundle_digest: str | None = None, in_flight: InFlight = "recompute"
    ) -> ChangeRequest:
        """What the registry is asked for."""
        return ChangeRequest(
            action=self.action,
            domain=self.name,
            bundle_digest=bundle_digest,
            in_flight=in_flight,
            actor=self.cause.actor,
            request_id=self.cause.request_id,
            reason=self.cause.reason,
        )

    def entry(self, outcome: audit.Outcome, error: str | None) -> AuditEntry:
        """What the audit log is told."""
        return AuditEntry(
            actor=self.cause.actor,
            request_id=self.cause.request_id,
            action=self.action,
            # Anything may come as a name; only what can be one is recorded.
            domain=self.name if is_domain_name(self.name) else None,
            epoch_before=self.epoch_before,
            epoch_after=self.epoch_before if outcome == "refused" else self.epoch_after,
            digest=self.digest,
            reason=self.cause.reason,
            outcome=outcome,
            error=error,
        )


class OperationService:
    """Asks for changes and follows them, on one of the fleet's servers."""

    def __init__(
        self,
        registry: Registry,
        store: BundleStore,
        reconciler: Reconciler,
        substrate: Substrate,
        *,
        audit_log: AuditLog | None = None,
        metrics: AlterMetrics | None = None,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        """`audit_log` None records nothing: for tests."""
        self._registry = registry
        self._store = store
        self._reconciler = reconciler
        self._substrate = substrate
        self._audit_log = audit_log
        self._metrics = metrics or AlterMetrics(CollectorRegistry())
        self._tracing = tracing

    async def ensure(self, domains: Mapping[str, Path]) -> None:
        """Records what a server was started with, where that is not the case already.

        Raises: as `activate`.
        """
        cause = Cause()
        for name, folder in domains.items():
            await self.activate(name, folder, cause=cause)

    async def activate(
        self,
        name: str,
        bundle: Path | str,
        in_flight: InFlight = "recompute",
        *,
        precondition: Precondition | None = None,
        idempotency: IdempotencyKey | None = None,
        cause: Cause | None = None,
    ) -> Operation:
        """Records that the bundle in a folder, or at a URL that the store may import from, is to be that of
        domain `name`. It is checked and stored before.

        Raises: DomainNameError, BundleError, DomainConflictError, NoFreeSlotError,
        IdempotencyConflictError or what `precondition` raises, and nothing is recorded; AuditError, and
        nothing is unless it says so; RegistryUnavailableError, and it may be.
        """
        attempt = _Attempt("activate", name, cause, self._reconciler.head)

        async def change() -> Operation:
            check_domain_name(name)
            if (earlier := await self._replayed(idempotency)) is not None:
                return earlier
            attempt.digest = await asyncio.to_thread(self._put, bundle)
            request = attempt.request(bundle_digest=attempt.digest, in_flight=in_flight)
            return await self._change(attempt, request, precondition, idempotency)

        return await self._run(attempt, change())

    async def revoke(
        self,
        name: str,
        *,
        precondition: Precondition | None = None,
        idempotency: IdempotencyKey | None = None,
        cause: Cause | None = None,
    ) -> Operation:
        """Records that domain `name` is to be forgotten no longer.

        Raises: DomainNotFoundError, IdempotencyConflictError or what `precondition` raises, and nothing is
        recorded; AuditError and RegistryUnavailableError as `activate`.
        """
        attempt = _Attempt("revoke", name, cause, self._reconciler.head)

        async def change() -> Operation:
            if (earlier := await self._replayed(idempotency)) is not None:
                return earlier
            if not is_domain_name(name):
                raise DomainNotFoundError(f"No active domain is named {name!r}", got=repr(name))
            return await self._change(attempt, attempt.request(), precondition, idempotency)

        return await self._run(attempt, change())

    async def fleet(self) -> tuple[int, tuple[Replica, ...]]:
        """The epoch of the log, and every server that has reported within a day.

        Raises: RegistryUnavailableError.
        """
        head = await asyncio.to_thread(self._registry.head)
        return head, await asyncio.to_thread(self._registry.replicas)

    async def get(self, operation_id: str) -> Operation:
        """Raises: OperationNotFoundError, RegistryUnavailableError."""

        def look() -> Operation:
            change = self._registry.operation(operation_id)
            return self._look(change, self._outcome(change))

        return await asyncio.to_thread(look)

    async def wait(self, operation: Operation, timeout_s: float) -> Operation:
        """The operation once it is settled and this server is through with it, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        epoch = operation.change.epoch
        while True:
            progress, is_here = self._reconciler.progress, self._reconciler.tried >= epoch
            operation = await self._looked(operation)
            left_s = deadline - time.monotonic()
            if (operation.is_settled and is_here) or left_s <= 0:
                return operation
            # This server tells when it has done something; at the others one has to look.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left_s, POLL_S if is_here else LONG_POLL_S)):
                    await progress.wait()

    async def _looked(self, operation: Operation) -> Operation:
        """As it is now; as it was if the registry does not answer: it is recorded in any case."""
        try:
            now = await asyncio.to_thread(self._look, operation.change, operation.outcome)
        except RegistryUnavailableError:
            return operation
        return dataclasses.replace(now, epoch=operation.epoch, is_replayed=operation.is_replayed)

    def _put(self, bundle: Path | str) -> str:
        """The digest. Raises: BundleError."""
        if isinstance(bundle, Path):
            return self._store.put(bundle, check=self._check_expert)
        return self._store.import_from(bundle, check=self._check_expert)

    def _check_expert(self, bundle: Bundle) -> None:
        """Raises: BundleError for what no server of this deployment could apply."""
        if bundle.manifest.kind != "forget-expert":
            raise BundleFormatError(
                "This bundle is of another kind",
                expected="forget-expert",
                got=bundle.manifest.kind,
                fix="Activate the folder of a domain, not that of the substrate.",
            )
        ForgetExpert.from_bundle(bundle, self._substrate)

    async def _replayed(self, idempotency: IdempotencyKey | None) -> Operation | None:
        """Raises: IdempotencyConflictError."""
        if idempotency is None:
            return None

        def look() -> Operation | None:
            change = self._registry.replayed(idempotency)
            return None if change is None else self._replay(change)

        return await asyncio.to_thread(look)

    def _replay(self, change: Change) -> Operation:
        operation = self._look(change, self._outcome(change))
        return dataclasses.replace(operation, is_replayed=True)

    async def _change(
        self,
        attempt: _Attempt,
        request: ChangeRequest,
        precondition: Precondition | None,
        idempotency: IdempotencyKey | None,
    ) -> Operation:
        def begin(head: int, current: Change | None) -> None:
            attempt.epoch_before = head
            if current is not None:
                attempt.replaces = request.action == "activate"
                attempt.digest = attempt.digest or current.bundle_digest
            self._record(attempt, "begun")
            attempt.has_begun = True

        def append() -> Appended:
            while True:
                try:
                    expected = self._checked_epoch(attempt, request, precondition)
                except Exception:
                    # The same request may have come first, and have made its own condition stale.
                    if idempotency is None:
                        raise
                    if (earlier := self._registry.replayed(idempotency)) is None:
                        raise
                    return Appended(change=earlier, outcome="replayed", head=earlier.epoch)
                try:
                    return self._registry.append(
                        request,
                        expected_epoch=expected,
                        idempotency=idempotency,
                        before_recording=begin,
                    )
                except EpochConflictError:
                    pass  # somebody was faster: the precondition is to be judged anew

        appended = await asyncio.to_thread(append)
        if appended.outcome == "replayed":
            return await asyncio.to_thread(self._replay, appended.change)
        outcome: Outcome = "unchanged"
        if appended.outcome == "recorded":
            self._reconciler.wake(appended.change.epoch)
            outcome = attempt.outcome
        else:
            attempt.epoch_before = appended.head
        attempt.epoch_after = appended.head
        await asyncio.to_thread(self._record, attempt, outcome)
        operation = Operation(
            change=appended.change,
            epoch=appended.head,
            outcome=outcome,
            state="pending",
            lagging=(),
            error=None,
        )
        return await self._looked(operation)

    def _checked_epoch(
        self, attempt: _Attempt, request: ChangeRequest, precondition: Precondition | None
    ) -> int | None:
        """The epoch at which the precondition holds. Raises: what it raises."""
        if precondition is None:
            return None
        state = self._registry.desired_state()
        attempt.epoch_before = state.epoch
        is_active = any(change.domain == request.domain for change in state.domains)
        # A revocation of what is not active is not found, whatever the condition.
        if is_active or request.action == "activate":
            precondition(state.epoch, is_active)
        return state.epoch

    def _outcome(self, change: Change) -> Outcome:
        if change.action == "revoke":
            return "revoked"
        return "replaced" if self._registry.replaces(change) else "created"

    def _look(self, change: Change, outcome: Outcome) -> Operation:
        replicas = self._registry.replicas()
        without = [r for r in replicas if r.applied_epoch < change.epoch]
        lagging = tuple(r for r in without if r.holds_lease)
        if not lagging:  # only the barrier proves it
            lagging = self._registry.barrier(change.epoch).lagging
        has_holder = any(r.holds_lease and r.applied_epoch >= change.epoch for r in replicas)
        refusals = [r for r in without if self._refuses(r, change)]
        state: OperationState
        if lagging:
            state = "applying" if has_holder else "pending"
        else:
            state = "failed" if refusals and not has_holder else "active"
        errors = [r.last_error for r in (*lagging, *refusals) if r.last_error is not None]
        return Operation(
            change=change,
            epoch=change.epoch,
            outcome=outcome,
            state=state,
            lagging=lagging,
            error=errors[0] if errors else None,
        )

    def _refuses(self, replica: Replica, change: Change) -> bool:
        """Whether a server without a change has said that it cannot apply it."""
        if replica.replica_id == self._reconciler.replica_id:
            return self._reconciler.applied < change.epoch <= self._reconciler.tried
        # One that has not reported since may not know of it; one that reports no more may be gone.
        has_reported = replica.seen_at > change.requested_at
        return replica.state == "failed" and has_reported and replica.silence_s < FAILURE_MEMORY_S

    async def _run(self, attempt: _Attempt, change: Coroutine[Any, Any, Operation]) -> Operation:
        """Runs it to its end, even if the caller is cancelled. A refusal is recorded."""

        async def run() -> Operation:
            with self._tracing.span(attempt.action, request_id=attempt.cause.request_id) as span:
                try:
                    operation = await change
                except Exception as error:
                    outcome: audit.Outcome = "failed" if attempt.has_begun else "refused"
                    self._metrics.count_operation(attempt.action, outcome)
                    span.set(outcome=outcome)
                    if isinstance(error, RegistryUnavailableError | RegistryMismatchError):
                        self._metrics.count_registry_error(error)
                    if not isinstance(error, AuditError):
                        await asyncio.to_thread(self._record, attempt, outcome, error)
                    raise
                what = "replayed" if operation.is_replayed else operation.outcome
                self._metrics.count_operation(attempt.action, what)
                span.set(
                    outcome=what,
                    domain=operation.change.domain,
                    digest=operation.change.bundle_digest,
                    epoch=operation.change.epoch,
                )
                return operation

        return await asyncio.shield(asyncio.create_task(run()))

    def _record(
        self, attempt: _Attempt, outcome: audit.Outcome, error: Exception | None = None
    ) -> None:
        """Returns once it is durable. Raises: AuditError."""
        if self._audit_log is None:
            return
        entry = attempt.entry(outcome, None if error is None else error_kind(error))
        try:
            self._audit_log.append(entry, is_owed=attempt.has_begun)
        except AuditError as failure:
            logger.error("An audit record was not written: %s", failure)
            if not attempt.has_begun:
                raise
            raise AuditError(
                f"The change came to an end ({outcome}, epoch {entry.epoch_after}), but that is not "
                "recorded yet",
                expected="an audit log that can be written",
                got=failure.got,
                fix="Mend the audit log: until then no domain can be changed. The record is written "
                "before the next one.",
            ) from failure
