"""Counters only rise, whatever happens to slots and names."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from alter_core.substrate import Substrate
from server.domains import DomainService
from server.engine.base import RoutedTokens
from server.metrics import AlterMetrics, RoutedTokenLedger, TokenCount
from tests.support.tiny import TinyBundles

from .conftest import MAX_DOMAINS, InMemoryEngine, Site


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def tokens(registry: CollectorRegistry, expert: str, path: str) -> float | None:
    return registry.get_sample_value("alter_routed_tokens_total", {"expert": expert, "path": path})


def test_the_ledger_adds_what_has_come_since() -> None:
    ledger = RoutedTokenLedger(AlterMetrics(CollectorRegistry()))
    for high, low in ((2, 5), (3, 11), (3, 11)):
        ledger.record([RoutedTokens(slot=1, high=high, low=low)], {1: "a"})
    assert ledger.total("a") == TokenCount(high=3, low=11)


def test_a_new_expert_in_a_slot_starts_from_zero() -> None:
    ledger = RoutedTokenLedger(AlterMetrics(CollectorRegistry()))
    ledger.record([RoutedTokens(slot=1, high=2, low=5)], {1: "a"})
    ledger.restart(1)
    ledger.record([RoutedTokens(slot=1, high=7, low=13)], {1: "b"})
    assert ledger.total("a") == TokenCount(high=2, low=5)
    assert ledger.total("b") == TokenCount(high=7, low=13)


def test_a_count_that_falls_was_restarted() -> None:
    ledger = RoutedTokenLedger(AlterMetrics(CollectorRegistry()))
    for count in (5, 2):
        ledger.record([RoutedTokens(slot=None, high=count, low=count)], {None: "retain"})
    assert ledger.total("retain") == TokenCount(high=7, low=7)


def test_unnamed_slots_are_ignored() -> None:
    ledger = RoutedTokenLedger(AlterMetrics(CollectorRegistry()))
    ledger.record([RoutedTokens(slot=2, high=1, low=1)], {})
    assert ledger.total("a") == TokenCount()


def test_metrics_follow_the_service(
    site: Site, bundles: TinyBundles, registry: CollectorRegistry
) -> None:
    async def run() -> None:
        server = site.replica(metrics=AlterMetrics(registry))
        engine, service = server.engine, server.service
        await server.parts.start({})
        await server.activate("a", bundles.experts["domain-0"])
        assert tokens(registry, "a", "high") == 0
        engine.counts = {None: (1, 40), 0: (3, 17)}
        await service.collect_routed_tokens()
        assert tokens(registry, "a", "low") == 17
        # Counted after the last collection, and collected by the switch itself.
        engine.counts = {None: (1, 50), 0: (4, 19)}
        await server.revoke("a")
        await server.activate("a", bundles.experts["domain-0"])
        engine.counts[0] = (2, 2)
        await service.collect_routed_tokens()

    asyncio.run(run())
    assert tokens(registry, "a", "high") == 6
    assert tokens(registry, "a", "low") == 21
    assert tokens(registry, "retain", "low") == 50
    assert registry.get_sample_value("alter_epoch") == 3
    assert registry.get_sample_value("alter_domains_active") == 1
    assert registry.get_sample_value("alter_switch_seconds_count") == 3
    assert registry.get_sample_value("alter_switch_seconds_bucket", {"le": "0.025"}) == 0
    assert registry.get_sample_value("alter_switch_seconds_bucket", {"le": "0.05"}) == 3
    switched = {
        o: registry.get_sample_value("alter_switched_requests_total", {"outcome": o})
        for o in ("kept", "recomputed")
    }
    assert switched == {"kept": 15, "recomputed": 6}
    assert registry.get_sample_value("alter_recomputed_tokens_total") == 390


def test_a_silent_engine_holds_up_nothing(substrate: Substrate) -> None:
    engine = InMemoryEngine(MAX_DOMAINS)
    service = DomainService(engine, substrate, MAX_DOMAINS)

    async def run() -> None:
        answer = asyncio.Event()

        async def never() -> list[RoutedTokens]:
            await answer.wait()
            return []

        engine.routed_tokens = never  # type: ignore[method-assign]
        await service.collect_routed_tokens(timeout_s=0.01)
        answer.set()
        await asyncio.sleep(0)

    asyncio.run(run())


def test_a_failing_engine_breaks_no_scrape(substrate: Substrate) -> None:
    engine = InMemoryEngine(MAX_DOMAINS)
    service = DomainService(engine, substrate, MAX_DOMAINS)

    async def fail() -> list[RoutedTokens]:
        raise RuntimeError("gone")

    engine.routed_tokens = fail  # type: ignore[method-assign]
    asyncio.run(service.collect_routed_tokens())
    assert service.is_trusted


def test_collectors_appear_in_an_exposition(registry: CollectorRegistry) -> None:
    AlterMetrics(registry)
    text = generate_latest(registry).decode()
    for name in (
        "alter_epoch 0.0",
        "alter_domains_active 0.0",
        'alter_switch_seconds_bucket{le="0.005"} 0.0',
        'alter_switched_requests_total{outcome="kept"} 0.0',
        "alter_recomputed_tokens_total 0.0",
        'alter_routed_tokens_total{expert="retain",path="low"} 0.0',
    ):
        assert name in text
