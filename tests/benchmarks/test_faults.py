"""The fault run: what it counts, and a small one over real processes."""

from __future__ import annotations

import asyncio
import dataclasses
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from alter_core.bundle import read_manifest
from alter_core.substrate import Substrate
from benchmarks.faults import barrier, report
from benchmarks.faults.churn import growth_ratio
from benchmarks.faults.episode import run_episode
from benchmarks.faults.ledger import Acknowledged, Ledger, Token
from benchmarks.faults.proxy import Proxy
from benchmarks.faults.settings import QUICK
from benchmarks.serving.processes import tree_memory_bytes
from server.registry import Change
from tests.support import postgres
from tests.support.engine_double import EngineDouble
from tests.support.tiny import TinyBundles, make_bundles

A, B = "sha256:" + "a" * 64, "sha256:" + "b" * 64


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> TinyBundles:
    return make_bundles(tmp_path_factory.mktemp("faults"), num_experts=5)


def change(epoch: int, digest: str | None, domain: str = "authors") -> Change:
    return Change(
        epoch=epoch,
        operation_id=f"operation-{epoch}",
        action="revoke" if digest is None else "activate",
        domain=domain,
        bundle_digest=digest,
        slot=0,
        in_flight="recompute",
        actor="ann",
        request_id=None,
        reason=None,
        requested_at=datetime.now(UTC),
    )


LOG = (change(1, A), change(2, B, "places"), change(3, None))


def token(at: float, epoch: int, *active: str) -> Token:
    return Token("replica-0", at, epoch, frozenset(active))


@pytest.mark.parametrize(
    ("shown", "word"),
    [
        (token(5.0, 1, A), "2 is active"),
        (token(5.0, 2, A), "other experts"),
        (token(5.0, 2, A, B, "sha256:c"), "other experts"),
        (token(5.0, 3, A, B), "other experts"),
        (token(5.0, 4), "nobody recorded"),
    ],
)
def test_a_token_without_an_active_domain_is_counted(shown: Token, word: str) -> None:
    ledger = Ledger()
    ledger.is_active(1, 1.0)
    ledger.is_active(2, 4.0)
    ledger.generated(shown)
    ledger.check(LOG)
    assert (ledger.num_tokens, ledger.num_violations) == (1, 1)
    assert word in ledger.violations[0]


def test_tokens_of_the_active_epoch_or_of_a_later_one_are_right() -> None:
    ledger = Ledger()
    ledger.is_active(2, 4.0)
    ledger.is_active(1, 5.0)
    for shown in (token(3.9, 0), token(3.9, 1, A), token(4.1, 2, A, B), token(4.1, 3, B)):
        ledger.generated(shown)
    ledger.check(LOG)
    assert (ledger.num_tokens, ledger.num_violations) == (4, 0)


def test_the_doubles_tokens_give_away_a_switch_that_was_left_out(bundles: TinyBundles) -> None:
    async def generate(has_switch: bool) -> Token:
        engine = EngineDouble(Substrate.read(bundles.substrate), 1)
        folder = bundles.experts["domain-0"]
        if has_switch:
            await engine.switch(epoch=1, slot=0, bundle=folder, digest=read_manifest(folder).digest)
        async for _ in engine.generate([1], 1):
            return Token("replica-0", 2.0, 1, engine.active)
        raise AssertionError

    log = (change(1, read_manifest(bundles.experts["domain-0"]).digest),)
    counts = []
    for has_switch in (True, False):
        ledger = Ledger()
        ledger.is_active(1, 1.0)
        ledger.generated(asyncio.run(generate(has_switch)))
        ledger.check(log)
        counts.append(ledger.num_violations)
    assert counts == [0, 1]


def test_an_acknowledged_change_that_the_log_lacks_or_has_altered_is_lost() -> None:
    ledger = Ledger()
    kept = Acknowledged("operation-1", 1, "authors", A)
    altered = Acknowledged("operation-2", 2, "places", A)
    gone = Acknowledged("operation-9", 3, "authors", None)
    for each in (kept, altered, gone):
        ledger.acknowledge(each)
    assert ledger.lost(LOG) == [altered, gone]


def test_memory_is_that_of_the_process_and_growth_that_of_its_samples() -> None:
    import os

    assert tree_memory_bytes(os.getpid()) > 50 * 2**20
    assert growth_ratio([100] * 10 + [150] * 80 + [103] * 10) == 1.03


def test_without_a_fleet_nothing_is_said_of_tokens_and_changes() -> None:
    figures, not_measured = report.figures_of({"barrier": {"ms": [20.0]}})
    assert figures["tokens_without_active_domain"] is None
    assert {"faults_injected", "acknowledged_changes_lost", "defects"} < set(not_measured)
    bars = report.judge(figures)
    assert bars["no token without an active domain"] is None
    assert bars["barrier within 100 ms"] is True


def test_a_bar_that_was_missed_or_not_measured_is_named(tmp_path: Path) -> None:
    run = {
        "faults": {"kill -9 at commit": 3},
        "tokens_checked": 10,
        "tokens_without_active_domain": 1,
        "acknowledged_changes": 4,
        "acknowledged_changes_lost": 0,
        "start_s": [0.5],
        "recovery_s": [0.1, 9.0],
        "defects": [],
        "violations": ["a token"],
    }
    path = report.write_report(tmp_path, QUICK, {"fleets": {"episodes": [run]}})
    page = path.with_suffix(".md").read_text()
    figures, not_measured = report.figures_of({"fleets": {"episodes": [run]}})
    bars = report.judge(figures)
    assert bars["no token without an active domain"] is False
    assert bars["recovery within the start and 2 s"] is False
    assert bars["no acknowledged change lost"] is True
    assert bars["barrier within 100 ms"] is None
    assert "barrier_p99_ms" in not_measured
    assert "| no token without an active domain | **no** |" in page
    assert "a token" in page


@pytest.fixture(scope="module")
def database() -> Any:
    with postgres.server() as server:
        yield server


def small(**fields: Any) -> Any:
    return dataclasses.replace(QUICK, lease_s=1.0, margin_s=0.4, **fields)


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_a_small_run_breaks_nothing(
    kind: str, bundles: TinyBundles, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    server = request.getfixturevalue("database") if kind == "postgresql" else None
    settings = small(rounds=2)
    result = asyncio.run(run_episode(7, bundles, tmp_path / "run", settings, server))
    assert result["defects"] == []
    assert result["violations"] == []
    assert (result["tokens_without_active_domain"], result["acknowledged_changes_lost"]) == (0, 0)
    assert sum(result["faults"].values()) >= 2
    assert result["tokens_checked"] > 20
    assert result["acknowledged_changes"] > 0


def test_barrier_of_a_few_changes(bundles: TinyBundles, tmp_path: Path) -> None:
    took = barrier.measure(bundles, tmp_path, small(barrier_clients=2, barrier_changes=4))
    assert len(took) == 4
    assert all(-1 < ms < 2000 for ms in took)


def test_the_proxy_loses_and_repeats_notifications_and_cuts(
    database: postgres.Server, tmp_path: Path
) -> None:
    import psycopg

    async def heard(proxy: Proxy, copies: int) -> int:
        proxy.notification_copies = copies
        connection = await psycopg.AsyncConnection.connect(
            host=str(proxy.folder), user="alter", dbname="postgres", autocommit=True
        )
        async with connection:
            await connection.execute("LISTEN here")
            await asyncio.to_thread(postgres.execute, str(database.folder), "NOTIFY here")
            return len([n async for n in connection.notifies(timeout=0.5)])

    async def run() -> list[int]:
        proxy = Proxy(database.folder / "proxy", database.folder)
        await proxy.open()
        try:
            found = [await heard(proxy, copies) for copies in (1, 0, 3)]
            proxy.cut()
            with pytest.raises(psycopg.OperationalError):
                await heard(proxy, 1)
            proxy.heal()
            return [*found, await heard(proxy, 1)]
        finally:
            await proxy.close()

    assert asyncio.run(run()) == [1, 0, 3, 1]
