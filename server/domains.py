"""Which forget domains are active, and the one place that changes it.

A change is one switch of the engine. Changes run one after another, each in a task of its own: a
client that goes away in the middle leaves a finished change behind, never half of one. After each
switch the workers are asked what they apply; if that is not what was asked for, the service loses
trust in its engine for good and nothing may be generated any more.

A change is in the audit log before the engine is asked for it, and what became of it afterwards; a
change that cannot be recorded is refused.

The registry lives in memory. It holds names, digests and figures, and no text to be forgotten.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from prometheus_client import CollectorRegistry

from alter_core.bundle import DOMAIN_NAME_PATTERN
from alter_core.errors import (
    AlterError,
    AuditError,
    BundleError,
    BundleNotFoundError,
    DomainConflictError,
    DomainNameError,
    DomainNotFoundError,
    EngineError,
    NoFreeSlotError,
    SwitchError,
    problem_kind,
)
from alter_core.substrate import ForgetExpert, Substrate
from server import audit
from server.audit import AuditEntry, AuditLog, Cause
from server.engine.base import CanaryReport, EngineState, ForgetEngine, InFlight, SwitchReport
from server.metrics import RETAIN, AlterMetrics, RoutedTokenLedger, TokenCount

logger = logging.getLogger(__name__)

T = TypeVar("T")

Outcome = Literal["created", "replaced", "unchanged"]

Precondition = Callable[[int, bool], None]
"""Called with the epoch and whether the name is active, right before a change. Raises to refuse; the
error's `kind`, if it has one, goes into the audit log."""

COLLECT_TIMEOUT_S = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActiveDomain:
    """One domain that is being forgotten."""

    name: str
    digest: str
    """Digest of the bundle that is applied."""
    slot: int
    epoch: int
    """The epoch that began with it."""
    since: datetime
    bundle: Path
    """Where the bundle was read from."""
    evaluation: dict[str, Any] | None
    """The figures of the bundle's evaluation; numbers only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation:
    """What an activation did."""

    domain: ActiveDomain
    outcome: Outcome
    epoch: int
    """The epoch now; higher than the domain's if it was active already."""
    report: SwitchReport | None
    """None if nothing had to change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Revocation:
    """What a revocation did."""

    domain: ActiveDomain
    """As it was."""
    report: SwitchReport


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceStatus:
    """The service as a whole."""

    epoch: int
    is_ready: bool
    is_trusted: bool
    distrust: str | None
    """Why the engine is not trusted."""
    substrate_digest: str | None
    max_domains: int
    num_active: int
    num_pending: int
    """Changes that run or wait."""
    canary: CanaryReport | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Change:
    """One switch to be made; without an expert the slot is emptied."""

    name: str
    slot: int
    in_flight: InFlight
    bundle: Path | None = None
    expert: ForgetExpert | None = None

    @property
    def digest(self) -> str | None:
        return None if self.expert is None else self.expert.digest


@dataclasses.dataclass(kw_only=True)
class _Attempt:
    """What the audit log will say of one attempt; the rest of it becomes known on the way."""

    action: audit.Action
    cause: Cause
    domain: str | None = None
    epoch_before: int
    digest: str | None = None
    has_begun: bool = False
    """The engine was asked."""


class DomainService:
    """Activates and revokes forget domains on a running engine."""

    def __init__(
        self,
        engine: ForgetEngine,
        substrate: Substrate,
        max_domains: int,
        *,
        metrics: AlterMetrics | None = None,
        audit_log: AuditLog | None = None,
    ) -> None:
        """`audit_log` None records nothing: for tests, and for engines that serve nobody."""
        self._engine = engine
        self._substrate = substrate
        self._max_domains = max_domains
        self._audit_log = audit_log
        self._metrics = metrics or AlterMetrics(CollectorRegistry())
        self._ledger = RoutedTokenLedger(self._metrics)
        self._domains: Mapping[str, ActiveDomain] = {}
        self._epoch = 0
        self._canary: CanaryReport | None = None
        self._is_ready = False
        self._is_switching = False
        self._distrust: str | None = None
        self._lock = asyncio.Lock()
        self._changes: set[asyncio.Task[Any]] = set()
        self._collection: asyncio.Task[None] | None = None
        self.on_distrust: list[Callable[[], None]] = []
        """Called once, when trust in the engine is lost."""

    @property
    def epoch(self) -> int:
        """Starts at 0 and rises by 1 with every change."""
        return self._epoch

    @property
    def is_trusted(self) -> bool:
        """False once what the engine applies is not known to be what was asked for."""
        return self._distrust is None and self._engine.is_trusted

    @property
    def is_serving(self) -> bool:
        """True while generation is allowed: started, and trusted."""
        return self._is_ready and self.is_trusted

    def check_trust(self) -> None:
        """Loses trust if the engine has lost its own; during a switch it may still come back."""
        if not self._is_switching and not self._engine.is_trusted:
            self._lose_trust("the engine could not prove what it applies")

    async def start(self, domains: Mapping[str, Path]) -> None:
        """Proves the engine with its canary, then activates `domains`. Nothing is generated before.

        Raises: CanaryError, BundleError, DomainError, EngineError, AuditError; the server must not
        start.
        """
        cause = Cause()
        started = _Attempt(
            action="start",
            cause=cause,
            epoch_before=self._epoch,
            digest=self._substrate.digest,
        )
        await self._record(started, "begun")
        try:
            self._canary = await self._engine.run_canary()
            await self._verify()
            for name, bundle in domains.items():
                await self.activate(name, bundle, cause=cause)
        except AuditError:
            raise
        except Exception as error:
            await self._record(started, "failed", error)
            raise
        await self._record(started, "done")
        self._is_ready = True

    async def activate(
        self,
        name: str,
        bundle: Path,
        in_flight: InFlight = "recompute",
        *,
        precondition: Precondition | None = None,
        cause: Cause | None = None,
    ) -> Activation:
        """Makes the expert at `bundle` the one of domain `name`.

        The bundle is read and verified before the engine is asked for anything. The digest that is
        active already changes nothing; another one replaces it in its slot, as one switch.

        Raises: DomainNameError, BundleError, DomainConflictError, NoFreeSlotError, SwitchError or
        what `precondition` raises, and nothing has changed; EngineError, and generation is refused;
        AuditError, and nothing has changed unless it says so.
        """
        attempt = self._attempt("activate", name, cause)

        async def change() -> Activation:
            check_domain_name(name)
            expert = await asyncio.to_thread(_read_expert, bundle, self._substrate)
            attempt.digest = expert.digest
            async with self._turn(attempt):
                return await self._activate(attempt, name, bundle, expert, in_flight, precondition)

        return await self._run(attempt, change)

    async def revoke(
        self,
        name: str,
        in_flight: InFlight = "recompute",
        *,
        precondition: Precondition | None = None,
        cause: Cause | None = None,
    ) -> Revocation:
        """Ends domain `name`; the base model's answers come back.

        Raises: DomainNotFoundError, SwitchError or what `precondition` raises, and nothing has
        changed; EngineError, and generation is refused; AuditError, and nothing has changed unless it
        says so.
        """
        attempt = self._attempt("revoke", name, cause)

        async def change() -> Revocation:
            async with self._turn(attempt):
                return await self._revoke(attempt, name, in_flight, precondition)

        return await self._run(attempt, change)

    def list(self) -> tuple[ActiveDomain, ...]:
        """The active domains, by name."""
        return tuple(self._domains[name] for name in sorted(self._domains))

    def show(self, name: str) -> ActiveDomain:
        """Raises: DomainNotFoundError."""
        try:
            return self._domains[name]
        except KeyError:
            raise DomainNotFoundError(
                f"No active domain is named {name!r}",
                expected=f"one of: {', '.join(sorted(self._domains)) or '(none is active)'}",
                got=repr(name),
                fix="List the active ones with `alter domains list`.",
            ) from None

    def status(self) -> ServiceStatus:
        """The service as a whole, without asking the engine."""
        return ServiceStatus(
            epoch=self._epoch,
            is_ready=self._is_ready,
            is_trusted=self.is_trusted,
            distrust=self._distrust_reason(),
            substrate_digest=self._substrate.digest,
            max_domains=self._max_domains,
            num_active=len(self._domains),
            num_pending=len(self._changes),
            canary=self._canary,
        )

    def routed_tokens(self, expert: str) -> TokenCount:
        """Tokens of a domain, or of `retain`, since the server started, as last collected."""
        return self._ledger.total(expert)

    async def collect_routed_tokens(self, timeout_s: float = COLLECT_TIMEOUT_S) -> None:
        """Brings the counters up to date if the engine answers in time. Never raises.

        Does nothing during a change: who owned which slot would be unclear.
        """
        if not self._lock.locked():
            await self._collect(timeout_s)

    def _attempt(self, action: audit.Action, name: str, cause: Cause | None) -> _Attempt:
        return _Attempt(
            action=action,
            cause=cause or Cause(),
            # Anything may come as a name; only what can be one is recorded.
            domain=name if is_domain_name(name) else None,
            epoch_before=self._epoch,
        )

    async def _run(self, attempt: _Attempt, change: Callable[[], Awaitable[T]]) -> T:
        """Runs a change to its end, even if the caller is cancelled. A failure is recorded."""

        async def run() -> T:
            try:
                return await change()
            except AuditError:
                raise
            except Exception as error:
                await self._record_failure(attempt, error)
                raise

        task = asyncio.create_task(run())
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)
        return await asyncio.shield(task)

    @contextlib.asynccontextmanager
    async def _turn(self, attempt: _Attempt) -> AsyncIterator[None]:
        """Alone, after those that came before. Raises: EngineError if the engine is not trusted."""
        async with self._lock:
            attempt.epoch_before = self._epoch
            self._require_trust()
            yield

    async def _activate(
        self,
        attempt: _Attempt,
        name: str,
        bundle: Path,
        expert: ForgetExpert,
        in_flight: InFlight,
        precondition: Precondition | None,
    ) -> Activation:
        current = self._domains.get(name)
        if current is None or current.digest != expert.digest:
            names = {str(domain.digest): domain.name for domain in self._domains.values()}
            check_other_names(str(expert.digest), names)
        if current is None:
            slot = free_slot({d.slot for d in self._domains.values()}, self._max_domains)
        else:
            slot = current.slot
        if precondition is not None:
            precondition(self._epoch, current is not None)
        if current is not None and current.digest == expert.digest:
            await self._record(attempt, "unchanged")
            return Activation(domain=current, outcome="unchanged", epoch=self._epoch, report=None)
        change = _Change(name=name, slot=slot, in_flight=in_flight, bundle=bundle, expert=expert)
        outcome: Outcome = "created" if current is None else "replaced"
        report = await self._switch(change, attempt, outcome)
        return Activation(
            domain=self._domains[name], outcome=outcome, epoch=self._epoch, report=report
        )

    async def _revoke(
        self,
        attempt: _Attempt,
        name: str,
        in_flight: InFlight,
        precondition: Precondition | None,
    ) -> Revocation:
        domain = self.show(name)
        attempt.digest = domain.digest
        if precondition is not None:
            precondition(self._epoch, True)
        change = _Change(name=name, slot=domain.slot, in_flight=in_flight)
        return Revocation(domain=domain, report=await self._switch(change, attempt, "revoked"))

    async def _record(
        self, attempt: _Attempt, outcome: audit.Outcome, error: Exception | None = None
    ) -> None:
        """Returns once it is durable. Raises: AuditError."""
        if self._audit_log is None:
            return
        epoch_after: int | None = self._epoch
        if outcome == "refused":
            epoch_after = attempt.epoch_before
        elif outcome == "begun" or not self.is_trusted:
            epoch_after = None
        entry = AuditEntry(
            actor=attempt.cause.actor,
            request_id=attempt.cause.request_id,
            action=attempt.action,
            domain=attempt.domain,
            epoch_before=attempt.epoch_before,
            epoch_after=epoch_after,
            digest=attempt.digest,
            reason=attempt.cause.reason,
            outcome=outcome,
            error=None if error is None else _error_kind(error),
        )
        try:
            await asyncio.to_thread(self._audit_log.append, entry, is_owed=attempt.has_begun)
        except AuditError as failure:
            logger.error("An audit record was not written: %s", failure)
            if not attempt.has_begun:
                raise
            raise AuditError(
                f"The change came to an end ({outcome}, epoch {epoch_after}), but that is not recorded yet",
                expected="an audit log that can be written",
                got=failure.got,
                fix="Mend the audit log: until then no domain can be changed. The record is written "
                "before the next one.",
            ) from failure

    async def _record_failure(self, attempt: _Attempt, error: Exception) -> None:
        await self._record(attempt, "failed" if attempt.has_begun else "refused", error)

    async def _switch(
        self, change: _Change, attempt: _Attempt, outcome: audit.Outcome
    ) -> SwitchReport:
        """Records `outcome` if it succeeds."""
        await self._record(attempt, "begun")
        attempt.has_begun = True
        await self._collect(COLLECT_TIMEOUT_S)
        self._is_switching = True
        try:
            report = await self._engine.switch(
                epoch=self._epoch + 1,
                slot=change.slot,
                bundle=change.bundle,
                digest=change.digest,
                in_flight=change.in_flight,
            )
            # No await between the engine's return and this: the first token computed under the new
            # experts must find the new epoch.
            self._publish(change, report)
        except BundleError:
            raise
        except SwitchError:
            await self._verify()
            raise
        except BaseException as error:
            self._lose_trust(f"a switch ended with {type(error).__name__}")
            raise
        finally:
            self._is_switching = False
        await self._verify()
        await self._record(attempt, outcome)
        return report

    def _publish(self, change: _Change, report: SwitchReport) -> None:
        if report.epoch != self._epoch + 1:
            raise EngineError(
                "The engine reports another epoch than the one asked for",
                expected=str(self._epoch + 1),
                got=str(report.epoch),
                fix=_RESTART,
            )
        domains = {name: domain for name, domain in self._domains.items() if name != change.name}
        if change.expert is not None:
            assert change.bundle is not None
            assert change.expert.digest is not None
            domains[change.name] = ActiveDomain(
                name=change.name,
                digest=change.expert.digest,
                slot=change.slot,
                epoch=report.epoch,
                since=datetime.now(UTC),
                bundle=change.bundle,
                evaluation=_figures(change.expert.evaluation),
            )
            self._metrics.add_routed_tokens(change.name, high=0, low=0)
        self._domains, self._epoch = domains, report.epoch
        self._ledger.restart(change.slot)
        self._metrics.set_state(epoch=report.epoch, num_domains=len(domains))
        self._metrics.observe_switch(report)

    async def _verify(self) -> None:
        """Asks the workers what they apply.

        Raises: EngineError, and trust is lost, unless it is exactly what the registry says.
        """
        digests: list[str | None] = [None] * self._max_domains
        for domain in self._domains.values():
            digests[domain.slot] = domain.digest
        desired = EngineState(epoch=self._epoch, digests=tuple(digests))
        try:
            state = await self._engine.state()
        except BaseException as error:
            self._lose_trust(f"the workers did not say what they apply ({type(error).__name__})")
            raise
        if state != desired:
            self._lose_trust("the workers apply something else than what was asked for")
            raise EngineError(
                "The workers apply something else than what was asked for",
                expected=_describe(desired),
                got=_describe(state),
                fix=_RESTART,
            )

    def _lose_trust(self, reason: str) -> None:
        if self._distrust is not None:
            return
        self._distrust = reason
        logger.error("Generation is refused from now on: %s. %s", reason, _RESTART)
        for callback in self.on_distrust:
            callback()

    def _distrust_reason(self) -> str | None:
        if self._distrust is None and not self._engine.is_trusted:
            return "the engine could not prove what it applies"
        return self._distrust

    def _require_trust(self) -> None:
        if not self.is_trusted:
            raise EngineError(
                "Domains cannot be changed: it is not known which experts the engine applies",
                expected="a trusted engine",
                got=self._distrust_reason(),
                fix=_RESTART,
            )

    async def _collect(self, timeout_s: float) -> None:
        """Waits for a collection, the running one if there is one; never cancels a worker call."""
        if self._collection is None or self._collection.done():
            self._collection = asyncio.create_task(self._collect_once())
        await asyncio.wait({self._collection}, timeout=timeout_s)

    async def _collect_once(self) -> None:
        epoch = self._epoch
        try:
            counts = await self._engine.routed_tokens()
        except Exception as error:
            logger.warning("Routed-token counts could not be read: %s", error)
            self.check_trust()
            return
        if not self._is_switching and epoch == self._epoch:
            experts: dict[int | None, str] = {d.slot: d.name for d in self._domains.values()}
            self._ledger.record(counts, experts | {None: RETAIN})


def is_domain_name(name: str) -> bool:
    """True for what can name a forget domain."""
    return re.fullmatch(DOMAIN_NAME_PATTERN, name) is not None and name != RETAIN


def check_other_names(digest: str, names: Mapping[str, str]) -> None:
    """Raises: DomainConflictError if `names`, the active domains' by bundle digest, hold this bundle."""
    if (holder := names.get(digest)) is not None:
        raise DomainConflictError(
            f"This bundle is already active under the name {holder!r}",
            expected="a bundle that is not active under another name",
            got=digest,
            fix=f"Revoke {holder!r} first, or keep using that name.",
        )


def free_slot(taken: Collection[int], max_domains: int) -> int:
    """The first slot that is not taken. Raises: NoFreeSlotError."""
    for slot in range(max_domains):
        if slot not in taken:
            return slot
    raise NoFreeSlotError(
        "Every slot holds an expert",
        expected=f"fewer than {max_domains} active domains",
        got=str(len(taken)),
        fix="Revoke a domain, or restart with a larger --alter-max-domains.",
    )


def check_domain_name(name: str) -> None:
    """Raises: DomainNameError."""
    if not is_domain_name(name):
        raise DomainNameError(
            f"{name!r} cannot name a forget domain",
            expected=f"1 to 63 of a-z, 0-9 and '-', other than {RETAIN!r}",
            got=repr(name),
            fix="Choose another name, e.g. 'authors-2'.",
        )


_RESTART = "Restart the server; it comes back with the domains that `alter serve` was given."


def _read_expert(bundle: Path, substrate: Substrate) -> ForgetExpert:
    try:
        return ForgetExpert.read(bundle, substrate)
    except OSError as error:
        raise BundleNotFoundError(
            f"The bundle at {bundle} cannot be read",
            expected="a readable bundle folder",
            got=error.strerror or type(error).__name__,
            fix="Check the path and its permissions on the server's machine.",
        ) from error


def _error_kind(error: Exception) -> str:
    """A word for an error, and nothing of its text."""
    if isinstance(error, AlterError):
        return problem_kind(type(error))
    return str(getattr(error, "kind", "internal"))


def _figures(evaluation: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The numbers of an evaluation, and nothing that could hold text."""
    if evaluation is None:
        return None
    figures: dict[str, Any] = {}
    for name, value in evaluation.items():
        if isinstance(value, Mapping):
            figures[name] = _figures(value)
        elif isinstance(value, bool | int | float):
            figures[name] = value
    return figures


def _describe(state: EngineState) -> str:
    active = ", ".join(f"{slot}: {digest}" for slot, digest in enumerate(state.digests) if digest)
    return f"epoch {state.epoch} over {len(state.digests)} slots with {active or 'no expert'}"
