"""Prometheus collectors, and the ledger that turns engine counts into monotone counters.

vLLM's `/metrics` serves prometheus_client's default registry (or, with PROMETHEUS_MULTIPROC_DIR,
the files that collectors write), so registering there is all it takes to appear in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from server.engine.base import RoutedTokens, SwitchReport

RETAIN = "retain"
"""Label of the retain expert; therefore no forget domain may have this name."""

PAUSE_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class AlterMetrics:
    """The server's own collectors. One instance per registry."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._epoch = Gauge(
            "alter_epoch",
            "Rises by one with every change of the active forget domains",
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._num_domains = Gauge(
            "alter_domains_active",
            "Forget domains that are active",
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._pause_s = Histogram(
            "alter_switch_seconds",
            "For how long a switch of experts stopped generation",
            registry=registry,
            buckets=PAUSE_BUCKETS_S,
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
        self.set_state(epoch=0, num_domains=0)
        self.add_routed_tokens(RETAIN, high=0, low=0)
        for outcome in ("kept", "recomputed"):
            self._switched_requests.labels(outcome=outcome)

    def set_state(self, *, epoch: int, num_domains: int) -> None:
        """Publishes what is active."""
        self._epoch.set(epoch)
        self._num_domains.set(num_domains)

    def observe_switch(self, report: SwitchReport) -> None:
        """Records one finished switch."""
        self._pause_s.observe(report.pause_s)
        self._switched_requests.labels(outcome="kept").inc(report.kept_requests)
        self._switched_requests.labels(outcome="recomputed").inc(report.recomputed_requests)
        self._recomputed_tokens.inc(report.recomputed_tokens)

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
