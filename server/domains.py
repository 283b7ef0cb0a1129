"""Which forget domains this server applies, and the one place that switches its engine.

What is to be applied is the registry's to say; the reconciler hands it over, change by change. Each change is
one switch. After each switch the workers are asked what they apply; if that is not what was asked for, the
service loses trust in its engine for good and nothing may be generated any more.

What was applied, or could not be, is in the audit log. The service holds names, digests and figures, and no
text to be forgotten.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from alter_core.errors import (
    AlterError,
    AuditError,
    DomainNotFoundError,
    EngineError,
    NoFreeSlotError,
    SwitchError,
    problem_kind,
)
from alter_core.substrate import Substrate
from server import audit
from server.audit import AuditEntry, AuditLog, Cause
from server.bundle_figures import read_figures
from server.engine.base import (
    CanaryReport,
    EngineState,
    ForgetEngine,
    InFlight,
    SwitchReport,
    TracedToken,
)
from server.logs import log_context
from server.metrics import RETAIN, AlterMetrics, RoutedTokenLedger, TokenCount
from server.registry import Change, DesiredState
from server.tracing import NO_TRACING, Attribute, Tracing

logger = logging.getLogger(__name__)

COLLECT_TIMEOUT_S = 0.5
MAX_REPORTS = 256
"""Switches whose reports are kept."""

BundleOf = Callable[[str], Awaitable[Path]]
"""The folder of a bundle, by its digest, verified."""


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
    """When the change was recorded."""
    evaluation: dict[str, Any] | None
    """The figures of the bundle's evaluation; numbers only."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServiceStatus:
    """The service as a whole."""

    epoch: int
    is_started: bool
    is_trusted: bool
    distrust: str | None
    """Why the engine is not trusted."""
    substrate_digest: str | None
    max_domains: int
    num_active: int
    canary: CanaryReport | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedText:
    """How the tokens of a text were routed."""

    epoch: int
    tokens: tuple[TracedToken, ...]
    names: Mapping[int | None, str]
    """Of the experts that it may have been routed to, by slot."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Switch:
    """One switch to be made; without a domain the slot is emptied."""

    slot: int
    epoch: int
    """The one that is being gone to."""
    engine_epoch: int
    """The same if one switch is all of it. The engine undoes a switch by its epoch: no two have one."""
    cause: Cause
    name: str | None
    """Of the domain that comes, or of the one that goes."""
    in_flight: InFlight
    domain: ActiveDomain | None = None
    bundle: Path | None = None


class DomainService:
    """Applies changes to a running engine. One caller at a time: the reconciler."""

    def __init__(
        self,
        engine: ForgetEngine,
        substrate: Substrate,
        max_domains: int,
        *,
        metrics: AlterMetrics | None = None,
        audit_log: AuditLog | None = None,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        """`audit_log` None records nothing: for tests, and for engines that serve nobody."""
        self._engine = engine
        self._substrate = substrate
        self._max_domains = max_domains
        self._audit_log = audit_log
        self._metrics = metrics or AlterMetrics(CollectorRegistry())
        self._tracing = tracing
        self._ledger = RoutedTokenLedger(self._metrics)
        self._domains: Mapping[int, ActiveDomain] = {}
        self._epoch = 0
        self._engine_epoch = 0
        self._is_whole = True
        self._canary: CanaryReport | None = None
        self._is_switching = False
        self._distrust: str | None = None
        self._recorded_failure: tuple[int, str] | None = None
        self._proven_epoch = 0
        self._reports: OrderedDict[int, SwitchReport] = OrderedDict()
        self._collection: asyncio.Task[None] | None = None
        self.on_distrust: list[Callable[[], None]] = []
        """Called once, when trust in the engine is lost."""

    @property
    def epoch(self) -> int:
        """The epoch that is applied; 0 before the first change."""
        return self._epoch

    @property
    def proven_epoch(self) -> int:
        """The same, but only once the workers were asked after the switch what they apply."""
        return self._proven_epoch

    @property
    def is_whole(self) -> bool:
        """True while the engine applies all of the epoch and nothing else; False amid `restore`."""
        return self._is_whole

    @property
    def is_started(self) -> bool:
        """True once the canary has passed."""
        return self._canary is not None

    @property
    def is_trusted(self) -> bool:
        """False once what the engine applies is not known to be what was asked for."""
        return self._distrust is None and self._engine.is_trusted

    @property
    def is_sound(self) -> bool:
        """True while generation is allowed as far as the engine is concerned."""
        return self.is_started and self.is_trusted

    def check_trust(self) -> None:
        """Loses trust if the engine has lost its own; during a switch it may still come back."""
        if not self._is_switching and not self._engine.is_trusted:
            self._lose_trust("the engine could not prove what it applies")

    async def start(self) -> None:
        """Proves the engine with its canary. Nothing is generated before, and no domain is active.

        Raises: CanaryError, EngineError, AuditError; the server must not start.
        """
        cause = Cause()
        await self._record_start(cause, "begun")
        try:
            canary = await self._engine.run_canary()
            await self._verify()
        except Exception as error:
            await self._record_start(cause, "failed", error)
            raise
        await self._record_start(cause, "done")
        self._canary = canary
        self._metrics.set_canary(canary)

    async def apply(self, change: Change, bundle: Path | None) -> SwitchReport:
        """Makes the change that follows the applied epoch, as one linearizable switch. `bundle` is the
        verified folder of an activation.

        Raises: BundleError, NoFreeSlotError (the slot is beyond this server's) or SwitchError, and nothing
        has changed; EngineError, and the engine is not trusted any more.
        """
        assert change.epoch == self._epoch + 1, "changes are applied in their order"
        return await self._switch(
            await self._planned(change, bundle, epoch=change.epoch, engine_epoch=change.epoch)
        )

    async def restore(self, desired: DesiredState, bundle_of: BundleOf) -> None:
        """Brings the engine to a state of the log, from whatever it applies. Nothing may be generated
        meanwhile: in between it applies neither the old epoch nor the new one.

        Raises: as `apply`, and what `bundle_of` raises; what was done stays, and `is_whole` is False.
        """
        wanted = {change.slot: change for change in desired.domains}
        for slot in sorted(self._domains.keys() | wanted.keys()):
            change, active = wanted.get(slot), self._domains.get(slot)
            if change is not None:
                assert change.bundle_digest is not None
                if active is not None and (active.name, active.digest) == (
                    change.domain,
                    change.bundle_digest,
                ):
                    continue
                bundle = await bundle_of(change.bundle_digest)
                switch = await self._planned(
                    change, bundle, epoch=desired.epoch, engine_epoch=self._engine_epoch + 1
                )
            else:
                assert active is not None
                switch = _Switch(
                    slot=slot,
                    epoch=desired.epoch,
                    engine_epoch=self._engine_epoch + 1,
                    cause=Cause(),
                    name=active.name,
                    in_flight="recompute",
                )
            self._is_whole = False
            await self._switch(switch)
        self._epoch = self._proven_epoch = desired.epoch
        self._is_whole = True
        self._metrics.set_state(epoch=self._epoch, num_domains=len(self._domains))

    def list(self) -> tuple[ActiveDomain, ...]:
        """The active domains, by name."""
        return tuple(sorted(self._domains.values(), key=lambda domain: domain.name))

    def show(self, name: str) -> ActiveDomain:
        """Raises: DomainNotFoundError."""
        active = self.list()
        for domain in active:
            if domain.name == name:
                return domain
        raise DomainNotFoundError(
            f"No active domain is named {name!r}",
            expected=f"one of: {', '.join(d.name for d in active) or '(none is active)'}",
            got=repr(name),
            fix="List the active ones with `alter domains list`.",
        )

    def report(self, epoch: int) -> SwitchReport | None:
        """How this server switched to an epoch while it generated, if that was not long ago."""
        return self._reports.get(epoch)

    def status(self) -> ServiceStatus:
        """The service as a whole, without asking the engine."""
        return ServiceStatus(
            epoch=self._epoch,
            is_started=self.is_started,
            is_trusted=self.is_trusted,
            distrust=self._distrust_reason(),
            substrate_digest=self._substrate.digest,
            max_domains=self._max_domains,
            num_active=len(self._domains),
            canary=self._canary,
        )

    def routed_tokens(self, expert: str) -> TokenCount:
        """Tokens of a domain, or of `retain`, since the server started, as last collected."""
        return self._ledger.total(expert)

    async def collect_routed_tokens(self, timeout_s: float = COLLECT_TIMEOUT_S) -> None:
        """Brings the counters up to date if the engine answers in time. Never raises.

        Does nothing during a switch: who owned which slot would be unclear.
        """
        if not self._is_switching:
            await self._collect(timeout_s)

    async def trace(self, token_ids: Sequence[int]) -> RoutedText:
        """Routes of a text under the domains that are applied. Raises: EngineError."""
        while True:
            self._require_trust()
            trace = await self._engine.trace(token_ids)
            applied = {slot: domain.digest for slot, domain in self._domains.items()}
            traced = {slot: d for slot, d in enumerate(trace.state.digests) if d is not None}
            if traced == applied:  # no switch has come since
                names: dict[int | None, str] = {None: RETAIN}
                names.update((slot, domain.name) for slot, domain in self._domains.items())
                return RoutedText(epoch=self._epoch, tokens=trace.tokens, names=names)

    async def _planned(
        self, change: Change, bundle: Path | None, *, epoch: int, engine_epoch: int
    ) -> _Switch:
        """Raises: NoFreeSlotError, BundleTamperedError."""
        if change.slot >= self._max_domains:
            raise NoFreeSlotError(
                f"The registry gives {change.domain!r} a slot that this server does not have",
                expected=f"slot 0 to {self._max_domains - 1}",
                got=str(change.slot),
                fix="Restart this server with the --alter-max-domains of the others.",
            )
        domain = None
        if change.action == "activate":
            assert bundle is not None
            assert change.bundle_digest is not None
            domain = ActiveDomain(
                name=change.domain,
                digest=change.bundle_digest,
                slot=change.slot,
                epoch=change.epoch,
                since=change.requested_at,
                evaluation=await asyncio.to_thread(read_figures, bundle, change.bundle_digest),
            )
        return _Switch(
            slot=change.slot,
            epoch=epoch,
            engine_epoch=engine_epoch,
            cause=Cause(
                actor=change.actor,
                request_id=change.request_id or change.operation_id,
                reason=change.reason,
            ),
            name=change.domain,
            in_flight=change.in_flight,
            domain=domain,
            bundle=bundle,
        )

    async def _switch(self, switch: _Switch) -> SwitchReport:
        attributes: dict[str, Attribute] = {
            "request_id": switch.cause.request_id,
            "domain": switch.name,
            "digest": None if switch.domain is None else switch.domain.digest,
            "epoch": switch.epoch,
            "slot": switch.slot,
        }
        with (
            log_context(request_id=switch.cause.request_id, epoch=switch.epoch),
            self._tracing.span("switch", **attributes) as span,
        ):
            report = await self._switch_and_record(switch)
            span.set(
                stage_s=report.stage_s,
                pause_s=report.pause_s,
                kept_requests=report.kept_requests,
                recomputed_requests=report.recomputed_requests,
                recomputed_tokens=report.recomputed_tokens,
            )
        return report

    async def _switch_and_record(self, switch: _Switch) -> SwitchReport:
        self._require_trust()  # or nothing is tried, and nothing is to be recorded
        epoch_before = self._epoch
        try:
            report = await self._run_switch(switch)
        except Exception as error:
            self._metrics.count_switch_failure()
            failure = (switch.epoch, error_kind(error))
            if failure != self._recorded_failure:  # it is tried again and again
                await self._record_apply(switch, epoch_before, "failed", failure[1])
                self._recorded_failure = failure
            raise
        await self._record_apply(switch, epoch_before, "done", None)
        return report

    async def _run_switch(self, switch: _Switch) -> SwitchReport:
        await self._collect(COLLECT_TIMEOUT_S)
        self._is_switching = True
        try:
            report = await self._engine.switch(
                epoch=switch.engine_epoch,
                slot=switch.slot,
                bundle=switch.bundle,
                digest=None if switch.domain is None else switch.domain.digest,
                in_flight=switch.in_flight,
            )
            # No await between the engine's return and this: the first token computed under the new
            # experts must find the new epoch.
            self._publish(switch, report)
        except SwitchError:
            await self._verify()
            raise
        except AlterError as error:
            if not isinstance(error, EngineError):
                raise
            self._lose_trust(f"a switch ended with {type(error).__name__}")
            raise
        except BaseException as error:
            self._lose_trust(f"a switch ended with {type(error).__name__}")
            raise
        finally:
            self._is_switching = False
        await self._verify()
        self._proven_epoch = self._epoch
        return report

    def _publish(self, switch: _Switch, report: SwitchReport) -> None:
        if report.epoch != switch.engine_epoch:
            raise EngineError(
                "The engine reports another epoch than the one asked for",
                expected=str(switch.engine_epoch),
                got=str(report.epoch),
                fix=_RESTART,
            )
        domains = {slot: d for slot, d in self._domains.items() if slot != switch.slot}
        if switch.domain is not None:
            domains[switch.slot] = switch.domain
            self._metrics.add_routed_tokens(switch.domain.name, high=0, low=0)
        self._domains, self._engine_epoch = domains, report.epoch
        if self._is_whole:
            self._epoch = report.epoch
            self._reports[report.epoch] = report
            if len(self._reports) > MAX_REPORTS:
                self._reports.popitem(last=False)
        self._ledger.restart(switch.slot)
        self._metrics.set_state(epoch=self._epoch, num_domains=len(domains))
        self._metrics.observe_switch(report)

    async def _record_start(
        self, cause: Cause, outcome: audit.Outcome, error: Exception | None = None
    ) -> None:
        """Raises: AuditError."""
        if self._audit_log is None:
            return
        entry = AuditEntry(
            actor=cause.actor,
            request_id=cause.request_id,
            action="start",
            domain=None,
            epoch_before=None,
            epoch_after=None,
            digest=self._substrate.digest,
            reason=None,
            outcome=outcome,
            error=None if error is None else error_kind(error),
        )
        await asyncio.to_thread(self._audit_log.append, entry)

    async def _record_apply(
        self, switch: _Switch, epoch_before: int, outcome: audit.Outcome, error: str | None
    ) -> None:
        """What cannot be written is owed: to apply less than was recorded would be worse."""
        if self._audit_log is None:
            return
        entry = AuditEntry(
            actor=switch.cause.actor,
            request_id=switch.cause.request_id,
            action="apply",
            domain=switch.name,
            epoch_before=epoch_before,
            epoch_after=switch.epoch if outcome == "done" else epoch_before,
            digest=None if switch.domain is None else switch.domain.digest,
            reason=switch.cause.reason,
            outcome=outcome,
            error=error,
        )
        if not self.is_trusted:
            entry = dataclasses.replace(entry, epoch_after=None)
        try:
            await asyncio.to_thread(self._audit_log.append, entry, is_owed=True)
        except AuditError as failure:
            logger.error("An audit record was not written, and is owed: %s", failure)

    async def _verify(self) -> None:
        """Asks the workers what they apply.

        Raises: EngineError, and trust is lost, unless it is exactly what was asked for.
        """
        digests: list[str | None] = [None] * self._max_domains
        for slot, domain in self._domains.items():
            digests[slot] = domain.digest
        desired = EngineState(epoch=self._engine_epoch, digests=tuple(digests))
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
        epoch = self._engine_epoch
        try:
            counts = await self._engine.routed_tokens()
        except Exception as error:
            logger.warning("Routed-token counts could not be read: %s", error)
            self.check_trust()
            return
        if not self._is_switching and epoch == self._engine_epoch:
            experts: dict[int | None, str] = {
                slot: domain.name for slot, domain in self._domains.items()
            }
            self._ledger.record(counts, experts | {None: RETAIN})


_RESTART = "Restart the server; it comes back with the domains of the registry."


def error_kind(error: Exception) -> str:
    """A word for an error, and nothing of its text."""
    if isinstance(error, AlterError):
        return problem_kind(type(error))
    return str(getattr(error, "kind", "internal"))


def _describe(state: EngineState) -> str:
    active = ", ".join(f"{slot}: {digest}" for slot, digest in enumerate(state.digests) if digest)
    return f"epoch {state.epoch} over {len(state.digests)} slots with {active or 'no expert'}"
