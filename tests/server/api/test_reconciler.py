"""Several servers on one registry: what each applies, who may generate, and when a change is active."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from alter_core.errors import EngineError, RegistryUnavailableError, SwitchError
from server import reconciler as reconciler_module
from server.engine.base import EngineState, SwitchReport
from server.lease import HeldLease
from server.operations import Operation
from server.registry import BundleStore, ChangeRequest, Heartbeat, Lease
from tests.support import postgres
from tests.support.tiny import TinyBundles

from .conftest import WAIT_S, InMemoryEngine, Replica, Site

SHORT: dict[str, Any] = {"lease_s": 1.0, "clock_margin_s": 0.2}
Test = Callable[..., Awaitable[None]]


@pytest.fixture
def with_fleet(site: Site) -> Callable[..., None]:
    """Runs a coroutine function over servers that have started."""

    def run(test: Test, num_servers: int = 2, **options: Any) -> None:
        async def running() -> None:
            servers = [site.replica(**options) for _ in range(num_servers)]
            for server in servers:
                await server.parts.start({})
            await test(*servers)
            for server in servers:
                await server.reconciler.stop()

        asyncio.run(running())

    return run


async def state_of(server: Replica, operation: Operation) -> str:
    return (await server.operations.get(operation.change.operation_id)).state


def test_a_change_is_active_once_every_server_applies_it(
    with_fleet: Any, bundles: TinyBundles
) -> None:
    async def test(here: Replica, there: Replica) -> None:
        there.engine.gate = asyncio.Event()
        asked = await here.operations.activate("a", bundles.experts["domain-0"])
        await here.until(lambda: here.service.epoch == 1)
        await there.until(lambda: len(there.engine.switches) == 1)
        looked = await here.operations.wait(asked, 0.2)
        assert looked.state == "applying"
        [laggard] = looked.lagging
        assert (laggard.replica_id, laggard.applied_epoch) == (there.reconciler.replica_id, 0)
        assert here.reconciler.is_ready
        assert there.reconciler.may_generate
        assert not there.reconciler.is_ready
        there.engine.gate.set()
        assert (await here.operations.wait(asked, 20)).state == "active"
        assert there.service.show("a").digest == asked.change.bundle_digest
        revoked = await there.revoke("a")
        assert (revoked.state, here.service.list()) == ("active", ())

    with_fleet(test)


def test_a_change_is_not_active_before_the_workers_have_confirmed_it(
    with_fleet: Any, bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(server: Replica) -> None:
        confirmed = asyncio.Event()
        state = server.engine.state

        async def state_in_time() -> EngineState:
            await confirmed.wait()
            return await state()

        monkeypatch.setattr(server.engine, "state", state_in_time)
        asked = await server.operations.activate("a", bundles.experts["domain-0"])
        await server.until(lambda: server.service.epoch == 1)
        await server.reconciler._report()
        assert (await server.operations.wait(asked, 0.1)).state == "pending"
        assert not server.reconciler.is_ready
        confirmed.set()
        assert (await server.operations.wait(asked, 20)).state == "active"
        assert server.reconciler.is_ready
        assert server.service.report(1) is not None

    with_fleet(test, num_servers=1)


def test_a_change_is_reported_once(
    with_fleet: Any, bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(server: Replica) -> None:
        reported: list[int] = []
        heartbeat = server.parts.registry.heartbeat

        def heard(beat: Heartbeat) -> Lease:
            reported.append(beat.applied_epoch)
            return heartbeat(beat)

        monkeypatch.setattr(server.parts.registry, "heartbeat", heard)
        for epoch in (1, 2, 3):
            await server.activate("a", bundles.experts[f"domain-{epoch % 2}"])
            await server.reconciler._catch_up()  # nothing is left to apply, or to tell
        assert [e for e in reported if e] == [1, 2, 3]

    with_fleet(test, num_servers=1, lease_s=60.0)


def test_a_server_that_hangs_is_waited_for_until_its_lease_is_over(
    with_fleet: Any, bundles: TinyBundles
) -> None:
    async def test(here: Replica, there: Replica) -> None:
        there.engine.gate = asyncio.Event()
        started = time.monotonic()
        asked = await here.activate("a", bundles.experts["domain-0"])
        took = time.monotonic() - started
        assert asked.state == "active"
        assert 0.5 < took < 1.0 + 0.2 + 1.5
        assert not there.reconciler.may_generate
        assert here.reconciler.is_ready
        there.engine.gate.set()
        await there.until(lambda: there.reconciler.is_ready)

    with_fleet(test, **SHORT)


def test_a_server_that_cannot_apply_a_change_stops_and_says_why(
    with_fleet: Any, bundles: TinyBundles
) -> None:
    async def test(here: Replica, there: Replica) -> None:
        lapses: list[str] = []
        there.reconciler.on_lapse.append(lambda: lapses.append("cut"))
        there.engine.failure = SwitchError("no worker could copy")
        asked = await here.activate("a", bundles.experts["domain-0"])
        assert (asked.state, asked.error) in (("active", "switch"), ("active", None))
        assert (there.reconciler.may_generate, bool(lapses)) == (False, True)
        _, replicas = await here.operations.fleet()
        [failed] = [r for r in replicas if r.replica_id == there.reconciler.replica_id]
        assert (failed.state, failed.last_error, failed.applied_epoch) == ("failed", "switch", 0)
        assert there.reconciler.reason == "epoch 0 of 1 is applied, no lease is held, switch"
        there.engine.failure = None
        await there.until(lambda: there.reconciler.is_ready)
        assert there.service.epoch == 1

    with_fleet(test, **SHORT)


def test_a_change_that_nobody_can_apply_fails_and_is_taken_back(
    with_fleet: Any, bundles: TinyBundles
) -> None:
    async def test(here: Replica, there: Replica) -> None:
        for server in (here, there):
            server.engine.failure = SwitchError("no worker could copy")
        asked = await here.activate("a", bundles.experts["domain-0"])
        assert (asked.state, asked.error) == ("failed", "switch")
        assert not here.reconciler.may_generate
        revoked = await here.revoke("a")
        assert revoked.state == "active"
        await there.until(lambda: there.reconciler.is_ready and here.reconciler.is_ready)
        assert here.service.epoch == there.service.epoch == 2

    with_fleet(test, **SHORT)


def test_a_server_that_lost_its_trust_leaves_the_others_alone(
    with_fleet: Any, bundles: TinyBundles
) -> None:
    async def test(here: Replica, there: Replica) -> None:
        there.engine.failure = EngineError("undone")
        asked = await here.activate("a", bundles.experts["domain-0"])
        assert asked.state == "active"
        await there.until(lambda: there.reconciler.error == "engine")
        assert not there.reconciler.may_generate
        _, replicas = await here.operations.fleet()
        assert {r.state for r in replicas} == {"serving", "failed"}

    with_fleet(test)


def test_a_server_that_starts_applies_the_registry_before_it_generates(
    site: Site, bundles: TinyBundles
) -> None:
    async def first() -> None:
        server = site.replica()
        await server.parts.start({"a": bundles.experts["domain-0"]})
        await server.activate("b", bundles.experts["domain-1"])
        await server.revoke("b")
        await server.activate("c", bundles.experts["domain-2"])
        await server.reconciler.stop()

    async def second() -> None:
        server = site.replica()
        allowed: list[bool] = []
        switch = server.engine.switch

        async def watched(**options: Any) -> Any:
            allowed.append(server.reconciler.may_generate)
            return await switch(**options)

        server.engine.switch = watched  # type: ignore[method-assign]
        await server.parts.start({})
        assert (server.service.epoch, allowed) == (4, [False, False])
        assert [(d.name, d.slot, d.epoch) for d in server.service.list()] == [
            ("a", 0, 1),
            ("c", 1, 4),
        ]
        assert server.reconciler.is_ready
        await server.reconciler.stop()

    asyncio.run(first())
    asyncio.run(second())


def test_start_up_domains_are_ensured_at_every_start(site: Site, bundles: TinyBundles) -> None:
    epochs = []

    async def run(folder: Path, change: str = "") -> None:
        server = site.replica()
        await server.parts.start({"a": folder})
        epochs.append(server.service.epoch)
        if change == "revoke":
            await server.revoke("a")
        await server.reconciler.stop()

    asyncio.run(run(bundles.experts["domain-0"]))
    asyncio.run(run(bundles.experts["domain-0"], "revoke"))
    asyncio.run(run(bundles.experts["domain-0"]))
    asyncio.run(run(bundles.experts["domain-1"]))
    assert epochs == [1, 1, 3, 4]


def test_many_changes_are_applied_in_their_order(with_fleet: Any, bundles: TinyBundles) -> None:
    async def test(here: Replica, there: Replica) -> None:
        there.engine.gate = asyncio.Event()
        for number in (0, 1, 2):
            await here.operations.activate("a", bundles.experts[f"domain-{number}"])
        there.engine.gate.set()
        await there.until(lambda: there.service.epoch == 3)
        assert len(there.engine.switches) == 3
        assert there.reconciler.is_ready

    with_fleet(test)


def test_without_a_lease_only_the_latest_state_counts(
    with_fleet: Any, site: Site, bundles: TinyBundles
) -> None:
    async def test(server: Replica) -> None:
        server.engine.failure = SwitchError("no worker could copy")
        first = await server.operations.activate("a", bundles.experts["domain-0"])
        await server.operations.activate("a", bundles.experts["domain-1"])
        for folder in (site.store / "sha256").glob(
            str(first.change.bundle_digest).removeprefix("sha256:")
        ):
            (folder / "manifest.json").write_text("torn")
        server.expire_lease()
        server.engine.failure = None
        await server.until(lambda: server.reconciler.is_ready)
        assert (server.service.epoch, server.service.show("a").epoch) == (2, 2)

    with_fleet(test, 1)


def test_a_bundle_that_was_damaged_in_the_store_is_named_and_mended(
    site: Site, bundles: TinyBundles
) -> None:
    async def first() -> None:
        server = site.replica()
        await server.parts.start({"a": bundles.experts["domain-0"]})
        await server.reconciler.stop()

    async def second() -> None:
        [folder] = (site.store / "sha256").iterdir()
        (folder / "weights.safetensors").write_bytes(b"torn")
        server = site.replica()
        await server.parts.start({})
        assert (server.reconciler.may_generate, server.engine.switches) == (False, [])
        assert server.reconciler.error == "bundle-tampered"
        mended = await server.activate("a", bundles.experts["domain-0"])
        assert mended.outcome == "unchanged"
        await server.until(lambda: server.reconciler.is_ready)
        await server.reconciler.stop()

    asyncio.run(first())
    asyncio.run(second())


def test_a_registry_that_has_lost_changes_gives_no_leave_to_generate(
    with_fleet: Any, site: Site, bundles: TinyBundles
) -> None:
    async def test(server: Replica) -> None:
        await server.activate("a", bundles.experts["domain-0"])
        connection = sqlite3.connect(site.folder / "registry.sqlite")
        with connection:
            connection.execute("DELETE FROM changes")
        connection.close()
        await server.reconciler._report()
        assert server.reconciler.error == "registry-mismatch"
        server.expire_lease()
        server.reconciler._end_generation()
        await server.until(lambda: server.reconciler._error == "registry-mismatch")
        assert not server.reconciler.may_generate
        assert [d.name for d in server.service.list()] == ["a"]

    with_fleet(test, 1)


def test_a_registry_that_is_back_is_used_at_the_next_report(
    with_fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(server: Replica) -> None:
        registry = server.parts.registry

        def gone(*_: Any) -> Any:
            raise RegistryUnavailableError("no answer")

        with monkeypatch.context() as outage:
            outage.setattr(registry, "heartbeat", gone)
            outage.setattr(registry, "desired_state", gone)
            outage.setattr(registry, "changes_since", gone)
            await server.until(lambda: server.reconciler.error == "registry-unavailable")
            server.expire_lease()
            server.reconciler._end_generation()
            await server.until(lambda: server.reconciler._error is not None)
        started = time.monotonic()
        await server.until(lambda: server.reconciler.is_ready)
        assert time.monotonic() - started < 2.0

    monkeypatch.setattr(reconciler_module, "RETRY_S", 60.0)
    monkeypatch.setattr(reconciler_module, "MAX_RETRY_S", 60.0)
    with_fleet(test, 1, **SHORT)


def test_a_report_from_before_a_restoration_that_failed_halfway_brings_no_lease(
    with_fleet: Any, site: Site, bundles: TinyBundles
) -> None:
    async def test(server: Replica) -> None:
        await server.activate("a", bundles.experts["domain-0"])
        registry, is_asked, is_answered = (
            server.parts.registry,
            threading.Event(),
            threading.Event(),
        )
        heartbeat = registry.heartbeat

        def late(asked: Heartbeat) -> Lease:
            registry.heartbeat = heartbeat  # type: ignore[method-assign]
            lease = heartbeat(asked)
            is_asked.set()
            is_answered.wait(WAIT_S)
            return lease

        async with server.reconciler._reporting:
            registry.heartbeat = late  # type: ignore[method-assign]
            server.clock.advance(0.6 * registry.lease_s)
        report = asyncio.create_task(server.reconciler._report())
        await asyncio.to_thread(is_asked.wait, WAIT_S)
        # "a" moves to another slot; the expert that takes its place arrives, its own does not.
        _move_to_the_second_slot(site, "a", bundles)
        switch = server.engine.switch

        async def once(**options: Any) -> SwitchReport:
            server.engine.failure = None if options["slot"] == 0 else SwitchError("no worker could")
            return await switch(**options)

        server.engine.switch = once  # type: ignore[method-assign]
        server.clock.advance(0.6 * registry.lease_s)
        server.reconciler._end_generation()
        await server.until(lambda: server.reconciler.error == "switch")
        assert not server.service.is_whole
        is_answered.set()
        await report
        assert not server.reconciler.may_generate
        server.engine.switch = switch  # type: ignore[method-assign]
        server.engine.failure = None
        await server.until(lambda: server.reconciler.is_ready)
        assert [(d.name, d.slot) for d in server.service.list()] == [("a", 1), ("b", 0)]

    with_fleet(test, 1, poll_s=60.0)


def _move_to_the_second_slot(site: Site, name: str, bundles: TinyBundles) -> None:
    registry, store = site.registry(), BundleStore(str(site.store))
    moved, other = (store.put(bundles.experts[f"domain-{number}"]) for number in (0, 1))
    registry.append(ChangeRequest(action="revoke", domain=name, actor="ann"))
    for domain, digest in (("b", other), (name, moved)):
        registry.append(
            ChangeRequest(action="activate", domain=domain, bundle_digest=digest, actor="ann")
        )


def test_a_server_that_stops_leaves_the_list_at_once(with_fleet: Any, bundles: TinyBundles) -> None:
    async def test(here: Replica, there: Replica) -> None:
        await there.reconciler.stop()
        assert not there.reconciler.may_generate
        assert len((await here.operations.fleet())[1]) == 1
        started = time.monotonic()
        assert (await here.activate("a", bundles.experts["domain-0"])).state == "active"
        assert time.monotonic() - started < 5

    with_fleet(test)


def test_a_slot_that_this_server_lacks_keeps_it_from_generating(
    site: Site, bundles: TinyBundles
) -> None:
    async def run() -> None:
        large, small = site.replica(), site.replica(engine=InMemoryEngine(1))
        small.service._max_domains = 1
        for server in (large, small):
            await server.parts.start({})
        await large.operations.activate("a", bundles.experts["domain-0"])
        await large.operations.activate("b", bundles.experts["domain-1"])
        await small.until(lambda: small.reconciler.error == "no-free-slot")
        assert not small.reconciler.is_ready
        await large.until(lambda: large.reconciler.is_ready)
        for server in (large, small):
            await server.reconciler.stop()

    asyncio.run(run())


def test_servers_on_postgresql_tell_each_other(site: Site, bundles: TinyBundles) -> None:
    async def run() -> None:
        # Nobody looks by himself within the time of the test.
        servers = [site.replica(poll_s=60.0, lease_s=60.0) for _ in range(2)]
        for server in servers:
            await server.parts.start({})
        await asyncio.sleep(0.5)  # until both listen
        asked = await servers[0].activate("a", bundles.experts["domain-0"])
        assert (asked.state, servers[1].service.epoch) == ("active", 1)
        for server in servers:
            await server.reconciler.stop()

    with postgres.running() as socket:
        site.url = f"postgresql://alter@/postgres?host={socket}"
        asyncio.run(run())
        site.close()


def test_a_lease_counts_from_before_it_was_asked_for() -> None:
    now = [100.0]
    lease = HeldLease(lambda: now[0])
    assert (lease.is_held, lease.left_s) == (False, 0.0)
    asked_at = lease.now()
    now[0] = 103.0
    lease.extend(asked_at, 10.0)
    assert lease.left_s == 7.0
    lease.extend(asked_at, 2.0)
    lease.extend(now[0], 0.0)
    assert lease.left_s == 7.0
    now[0] = 110.0
    assert (lease.is_held, lease.left_s) == (False, 0.0)
    lease.extend(now[0], 1.0)
    assert lease.is_held
    lease.drop()
    assert not lease.is_held
