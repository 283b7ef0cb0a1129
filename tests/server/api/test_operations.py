"""Changes from their request to the registry, and what is refused before it gets there."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from alter_core.config import AlterConfig
from alter_core.errors import (
    BundleError,
    BundleFormatError,
    BundleNotFoundError,
    BundleTamperedError,
    DomainConflictError,
    DomainNameError,
    DomainNotFoundError,
    EpochConflictError,
    NoFreeSlotError,
    OperationNotFoundError,
    SubstrateMismatchError,
)
from server.operations import Operation
from server.registry import Change, IdempotencyKey
from tests.support.tiny import TinyBundles, make_bundles

from .conftest import MAX_DOMAINS, Replica, Site

Test = Callable[[Replica], Awaitable[None]]


@pytest.fixture
def with_server(site: Site) -> Callable[[Test], None]:
    """Runs a coroutine function over one server that has started."""

    def run(test: Test) -> None:
        async def running() -> None:
            server = site.replica()
            await server.parts.start({})
            await test(server)
            await server.reconciler.stop()

        asyncio.run(running())

    return run


def test_every_change_raises_the_epoch_by_one(with_server: Any, bundles: TinyBundles) -> None:
    async def test(server: Replica) -> None:
        created = await server.activate("a", bundles.experts["domain-0"])
        assert (created.outcome, created.epoch, created.change.slot) == ("created", 1, 0)
        assert created.state == "active"
        again = await server.activate("a", bundles.experts["domain-0"])
        assert (again.outcome, again.epoch, again.change) == ("unchanged", 1, created.change)
        replaced = await server.activate("a", bundles.experts["domain-1"])
        assert (replaced.outcome, replaced.epoch, replaced.change.slot) == ("replaced", 2, 0)
        later = await server.activate("b", bundles.experts["domain-0"])
        found = await server.activate("a", bundles.experts["domain-1"])
        assert (later.epoch, found.epoch, found.change.epoch) == (3, 3, 2)
        revoked = await server.revoke("a")
        assert (revoked.outcome, revoked.epoch, server.service.epoch) == ("revoked", 4, 4)
        for operation in (created, replaced, revoked):
            read = await server.operations.get(operation.change.operation_id)
            assert (read.outcome, read.change) == (operation.outcome, operation.change)
        with pytest.raises(OperationNotFoundError):
            await server.operations.get("nothing")

    with_server(test)


def test_a_revoked_slot_is_used_again(with_server: Any, bundles: TinyBundles) -> None:
    async def test(server: Replica) -> None:
        for index, name in enumerate("abc"):
            await server.activate(name, bundles.experts[f"domain-{index}"])
        with pytest.raises(NoFreeSlotError, match="fewer than 3"):
            await server.activate("d", bundles.experts["domain-3"])
        replaced = await server.activate("c", bundles.experts["domain-3"])
        assert (replaced.outcome, replaced.change.slot) == ("replaced", 2)
        await server.revoke("b")
        done = await server.activate("d", bundles.experts["domain-1"])
        assert done.change.slot == 1

    with_server(test)


def test_one_bundle_under_two_names_is_a_conflict(with_server: Any, bundles: TinyBundles) -> None:
    async def test(server: Replica) -> None:
        await server.activate("a", bundles.experts["domain-0"])
        await server.activate("b", bundles.experts["domain-1"])
        for name in ("c", "b"):
            with pytest.raises(DomainConflictError, match="'a'"):
                await server.activate(name, bundles.experts["domain-0"])
        assert server.service.epoch == 2

    with_server(test)


def test_names_that_cannot_be_or_are_not_active_are_refused(
    with_server: Any, bundles: TinyBundles
) -> None:
    async def test(server: Replica) -> None:
        for name in ("", "A", "a_b", "a" * 64, "a\n", "retain", "ä"):
            with pytest.raises(DomainNameError):
                await server.activate(name, bundles.experts["domain-0"])
            with pytest.raises(DomainNotFoundError):
                await server.revoke(name)
        with pytest.raises(DomainNotFoundError):
            await server.revoke("a")

    with_server(test)


def test_what_no_server_could_apply_is_not_recorded(
    with_server: Any, site: Site, bundles: TinyBundles, tmp_path: Path
) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(bundles.experts["domain-0"], torn)
    (torn / "weights.safetensors").write_bytes(b"other")
    config = AlterConfig(tap_layer=1, rank=4, lora_alpha=16.0, evidence_window=16)
    foreign = make_bundles(tmp_path / "foreign", num_experts=1, config=config)
    cases: list[tuple[Path, type[BundleError]]] = [
        (torn, BundleTamperedError),
        (tmp_path / "nothing", BundleNotFoundError),
        (tmp_path / ("long" * 100), BundleNotFoundError),
        (bundles.substrate, BundleFormatError),
        (foreign.experts["domain-0"], SubstrateMismatchError),
    ]

    async def test(server: Replica) -> None:
        for place, error in cases:
            with pytest.raises(error):
                await server.operations.activate("a", place)
        assert (server.parts.registry.head(), server.engine.switches) == (0, [])
        assert list((site.store / "sha256").glob("*")) == []

    with_server(test)


def test_a_cancelled_caller_leaves_a_finished_change(
    with_server: Any, bundles: TinyBundles
) -> None:
    async def test(server: Replica) -> None:
        server.engine.gate = asyncio.Event()
        caller = asyncio.create_task(server.activate("a", bundles.experts["domain-0"]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        server.engine.gate.set()
        await server.until(lambda: server.service.epoch == 1)
        assert (await server.revoke("a")).epoch == 2

    with_server(test)


def test_changes_asked_for_at_once_get_an_epoch_each(
    with_server: Any, bundles: TinyBundles
) -> None:
    async def test(server: Replica) -> None:
        done = await asyncio.gather(
            *(server.activate(f"d{i}", bundles.experts[f"domain-{i}"]) for i in range(MAX_DOMAINS))
        )
        assert sorted(o.epoch for o in done) == [1, 2, 3]
        assert sorted(o.change.slot for o in done) == [0, 1, 2]

    with_server(test)


def test_a_repetition_is_not_told_that_its_own_change_made_it_stale(
    with_server: Any, bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    def at_the_beginning(epoch: int, is_active: bool) -> None:
        if epoch != 0:
            raise EpochConflictError("The domains have changed since")

    async def test(server: Replica) -> None:
        async def ask(key: str) -> Operation:
            return await server.operations.activate(
                "a",
                bundles.experts["domain-0"],
                precondition=at_the_beginning,
                idempotency=IdempotencyKey(key=key, request_digest="sha256:" + "0" * 64),
            )

        first, replayed = await ask("k"), server.parts.registry.replayed
        looks = []

        def before_the_first_is_recorded(key: IdempotencyKey) -> Change | None:
            looks.append(key)
            return replayed(key) if len(looks) > 1 else None

        monkeypatch.setattr(server.parts.registry, "replayed", before_the_first_is_recorded)
        again = await ask("k")
        assert (again.is_replayed, again.change) == (True, first.change)
        with pytest.raises(EpochConflictError):
            await ask("another")

    with_server(test)
