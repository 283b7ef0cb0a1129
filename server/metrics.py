"""Prometheus collectors, and the ledger that turns engine counts into monotone counters.

vLLM's `/metrics` serves prometheus_client's default registry (or, with PROMETHEUS_MULTIPROC_DIR,
the files that collectors write), so registering there is all it takes to appear in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from alter_core.errors import RegistryError, problem_kind
from server.engine.base import CanaryReport, RoutedTokens, SwitchReport

RETAIN = "retain"
"""Label of the retain expert; therefore no forget domain may have this name."""

PAUSE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
STAGE_BUCKETS_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
HEARTBEAT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

REGISTRY_ERRORS = ("registry-unavailable", "registry-mismatch")
"""Kinds that keep a server from the registry; each is there from the start, so that its first one is seen
as an increase."""
CHANGES = ("activate", "revoke")
OPERATION_OUTCOMES = (
    "created", "replaced", "revoked", "unchanged", "replayed", "refused", "failed",
)  # fmt: skip
DENIALS = ("refused", "cut")
"""A request that may not generate is refused with 503, or cut if its answer has begun."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerState:
    """What a scrape finds."""

    desired_epoch: int
    """Of the log, as far as this server knows."""
    is_ready: bool
    is_trusted: bool
    is_registry_up: bool
    """The last report to the registry was answered."""
    lease_left_s: float
    lease_s: float
    num_owed: int
    """Audit records that could not be written yet."""


class AlterMetrics:
    """The server's own collectors. One instance per registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        def gauge(name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
            return Gauge(name, text, labels, registry=registry, multiprocess_mode="mostrecent")

        self._epoch = gauge(
            "alter_epoch",
            "The epoch that is applied; rises by one with every change of the active forget domains",
        )
        self._num_domains = gauge("alter_domains_active", "Forget domains that are active")
        self._desired_epoch = gauge(
            "alter_epoch_desired", "The epoch to be applied, as far as this server knows"
        )
        self._ready = gauge(
            "alter_ready", "1 while the server generates and applies all that it knows of"
        )
        self._trusted = gauge(
            "alter_engine_trusted", "0 once the engine could not prove what it applies: restart it"
        )
        self._registry_up = gauge(
            "alter_registry_up", "1 if the last report to the registry was answered"
        )
        self._lease_left_s = gauge(
            "alter_lease_remaining_seconds",
            "For how long the server may generate without another word of the registry",
        )
        self._lease_s = gauge("alter_lease_duration_seconds", "What a lease is granted for")
        self._owed_records = gauge(
            "alter_audit_records_owed",
            "Audit records of what has happened that are not written yet",
        )
        self._canary_change = gauge(
            "alter_canary_min_logit_change_nats",
            "Smallest change by an expert planted at one site, when the server started",
        )
        self._canary_s = gauge("alter_canary_seconds", "How long the canary took at the start")
        self._info = gauge(
            "alter_info", "1; what is served, in the labels", ["version", "substrate"]
        )
        self._pause_s = Histogram(
            "alter_switch_seconds",
            "For how long a switch of experts stopped generation",
            registry=registry,
            buckets=PAUSE_BUCKETS_S,
        )
        self._stage_s = Histogram(
            "alter_switch_stage_seconds",
            "How long an expert was read and verified before a switch, while generation went on",
            registry=registry,
            buckets=STAGE_BUCKETS_S,
        )
        self._switch_failures = Counter(
            "alter_switch_failures", "Switches of experts that failed", registry=registry
        )
        self._switched_requests = Counter(
            "alter_switched_requests",
            "Requests that ran at a switch of experts, by what became of them",
            ["outcome"],
            registry=registry,
        )
        self._recomputed_tokens = Counter(
            "alter_recomputed_tokens",
            "Tokens computed before a switch of experts that it made the engine compute again",
            registry=registry,
        )
        self._routed_tokens = Counter(
            "alter_routed_tokens",
            "Tokens computed by an expert, by path of Eq. 9",
            ["expert", "path"],
            registry=registry,
        )
        self._operations = Counter(
            "alter_operations",
            "Changes of forget domains that this server was asked for, by what became of them",
            ["action", "outcome"],
            registry=registry,
        )
        self._denied_requests = Counter(
            "alter_denied_requests",
            "Requests that could not generate for want of trust or of a lease",
            ["how"],
            registry=registry,
        )
        self._heartbeat_s = Histogram(
            "alter_registry_heartbeat_seconds",
            "How long the registry took to answer a report",
            registry=registry,
            buckets=HEARTBEAT_BUCKETS_S,
        )
        self._registry_errors = Counter(
            "alter_registry_errors",
            "Calls of the registry or its store that failed, by kind",
            ["kind"],
            registry=registry,
        )
        self._audit_failures = Counter(
            "alter_audit_failures", "Audit records that could not be written", registry=registry
        )
        self._begin()

    def _begin(self) -> None:
        """Every series is there from the start, or its first increase would not be seen as one."""
        self.set_state(epoch=0, num_domains=0)
        self.add_routed_tokens(RETAIN, high=0, low=0)
        for outcome in ("kept", "recomputed"):
            self._switched_requests.labels(outcome=outcome)
        for how in DENIALS:
            self._denied_requests.labels(how=how)
        for kind in REGISTRY_ERRORS:
            self._registry_errors.labels(kind=kind)
        for action in CHANGES:
            for result in OPERATION_OUTCOMES:
                self._operations.labels(action=action, outcome=result)

    def set_info(self, *, version: str, substrate: str) -> None:
        """Names what is served: the package's version, the substrate's digest."""
        self._info.labels(version=version, substrate=substrate).set(1)

    def set_canary(self, report: CanaryReport) -> None:
        """Publishes what the canary found."""
        self._canary_change.set(report.min_logit_change)
        self._canary_s.set(report.seconds)

    def set_server(self, state: ServerState) -> None:
        """Publishes what holds at the moment of a scrape."""
        self._desired_epoch.set(state.desired_epoch)
        self._ready.set(state.is_ready)
        self._trusted.set(state.is_trusted)
        self._registry_up.set(state.is_registry_up)
        self._lease_left_s.set(state.lease_left_s)
        self._lease_s.set(state.lease_s)
        self._owed_records.set(state.num_owed)

    def set_state(self, *, epoch: int, num_domains: int) -> None:
        """Publishes what is active."""
        self._epoch.set(epoch)
        self._num_domains.set(num_domains)

    def observe_switch(self, report: SwitchReport) -> None:
        """Records one finished switch."""
        self._pause_s.observe(report.pause_s)
        self._stage_s.observe(report.stage_s)
        self._switched_requests.labels(outcome="kept").inc(report.kept_requests)
        self._switched_requests.labels(outcome="recomputed").inc(report.recomputed_requests)
        self._recomputed_tokens.inc(report.recomputed_tokens)

    def count_switch_failure(self) -> None:
        """Counts a switch that failed."""
        self._switch_failures.inc()

    def count_operation(self, action: str, outcome: str) -> None:
        """Counts a change that was asked for here: of CHANGES, by OPERATION_OUTCOMES."""
        self._operations.labels(action=action, outcome=outcome).inc()

    def count_denial(self, how: str) -> None:
        """Counts a request that could not generate, by DENIALS."""
        self._denied_requests.labels(how=how).inc()

    def observe_heartbeat(self, seconds: float) -> None:
        """Records one answered report to the registry."""
        self._heartbeat_s.observe(seconds)

    def count_registry_error(self, error: RegistryError) -> None:
        """Counts a call of the registry that failed."""
        self._registry_errors.labels(kind=problem_kind(type(error))).inc()

    def count_audit_failure(self) -> None:
        """Counts an audit record that could not be written."""
        self._audit_failures.inc()

    def add_routed_tokens(self, expert: str, *, high: int, low: int) -> None:
        """Adds to an expert's counters, creating them if they are new."""
        self._routed_tokens.labels(expert=expert, path="high").inc(high)
        self._routed_tokens.labels(expert=expert, path="low").inc(low)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenCount:
    """Tokens by path of Eq. 9."""

    high: int = 0
    low: int = 0


class RoutedTokenLedger:
    """Totals by expert name since the server started.

    The engine counts per slot and from zero for each expert that enters one. Totals only rise, also
    over a revocation and a later activation under the same name.
    """

    def __init__(self, metrics: AlterMetrics) -> None:
        self._metrics = metrics
        self._seen: dict[int | None, TokenCount] = {}
        self._totals: dict[str, TokenCount] = {}

    def restart(self, slot: int) -> None:
        """A new expert enters `slot`: its counts start from zero."""
        self._seen.pop(slot, None)

    def record(self, counts: Iterable[RoutedTokens], experts: Mapping[int | None, str]) -> None:
        """Adds what has come since the last call. `experts` names the expert in each slot.

        Counts of a slot without a name are ignored. A count below the last one means that the
        engine has restarted it.
        """
        for count in counts:
            name = experts.get(count.slot)
            if name is None:
                continue
            seen = self._seen.get(count.slot, TokenCount())
            if count.high < seen.high or count.low < seen.low:
                seen = TokenCount()
            self._seen[count.slot] = TokenCount(high=count.high, low=count.low)
            self._add(name, high=count.high - seen.high, low=count.low - seen.low)

    def total(self, expert: str) -> TokenCount:
        """Tokens of `expert` since the server started, as of the last `record`."""
        return self._totals.get(expert, TokenCount())

    def _add(self, expert: str, *, high: int, low: int) -> None:
        total = self.total(expert)
        self._totals[expert] = TokenCount(high=total.high + high, low=total.low + low)
        self._metrics.add_routed_tokens(expert, high=high, low=low)
