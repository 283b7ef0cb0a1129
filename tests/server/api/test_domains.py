"""Activation, replacement and revocation, and what makes the service lose its trust."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alter_core.errors import (
    BundleNotFoundError,
    BundleTamperedError,
    DomainConflictError,
    DomainNameError,
    DomainNotFoundError,
    EngineError,
    NoFreeSlotError,
    SwitchError,
)
from alter_core.substrate import Substrate
from server.domains import DomainService
from server.engine.base import EngineState
from tests.support.tiny import TinyBundles

from .conftest import MAX_DOMAINS, InMemoryEngine


@pytest.fixture
def engine() -> InMemoryEngine:
    return InMemoryEngine(MAX_DOMAINS)


@pytest.fixture
def service(engine: InMemoryEngine, substrate: Substrate) -> DomainService:
    return DomainService(engine, substrate, MAX_DOMAINS)


def test_every_change_raises_the_epoch_by_one(service: DomainService, bundles: TinyBundles) -> None:
    async def run() -> None:
        assert service.epoch == 0
        created = await service.activate("a", bundles.experts["domain-0"])
        assert (created.outcome, created.epoch, created.domain.slot) == ("created", 1, 0)
        again = await service.activate("a", bundles.experts["domain-0"])
        assert (again.outcome, again.epoch, again.report) == ("unchanged", 1, None)
        replaced = await service.activate("a", bundles.experts["domain-1"])
        assert (replaced.outcome, replaced.epoch, replaced.domain.slot) == ("replaced", 2, 0)
        revoked = await service.revoke("a")
        assert (revoked.report.epoch, service.epoch, service.list()) == (3, 3, ())

    asyncio.run(run())


def test_replacing_is_one_switch_in_the_same_slot(
    service: DomainService, engine: InMemoryEngine, bundles: TinyBundles
) -> None:
    async def run() -> None:
        await service.activate("a", bundles.experts["domain-0"])
        await service.activate("b", bundles.experts["domain-1"], "abort")
        await service.activate("b", bundles.experts["domain-2"])

    asyncio.run(run())
    assert [switch["slot"] for switch in engine.switches] == [0, 1, 1]
    assert [switch["in_flight"] for switch in engine.switches] == [
        "recompute",
        "abort",
        "recompute",
    ]


def test_a_revoked_slot_is_used_again(service: DomainService, bundles: TinyBundles) -> None:
    async def run() -> None:
        for index, name in enumerate("abc"):
            await service.activate(name, bundles.experts[f"domain-{index}"])
        with pytest.raises(NoFreeSlotError, match="fewer than 3"):
            await service.activate("d", bundles.experts["domain-3"])
        await service.revoke("b")
        done = await service.activate("d", bundles.experts["domain-3"])
        assert done.domain.slot == 1

    asyncio.run(run())


def test_a_full_service_still_replaces(service: DomainService, bundles: TinyBundles) -> None:
    async def run() -> None:
        for index, name in enumerate("abc"):
            await service.activate(name, bundles.experts[f"domain-{index}"])
        done = await service.activate("c", bundles.experts["domain-3"])
        assert (done.outcome, done.domain.slot) == ("replaced", 2)

    asyncio.run(run())


def test_one_bundle_under_two_names_is_a_conflict(
    service: DomainService, bundles: TinyBundles
) -> None:
    async def run() -> None:
        await service.activate("a", bundles.experts["domain-0"])
        await service.activate("b", bundles.experts["domain-1"])
        for name in ("c", "b"):
            with pytest.raises(DomainConflictError, match="'a'"):
                await service.activate(name, bundles.experts["domain-0"])
        assert service.epoch == 2

    asyncio.run(run())


@pytest.mark.parametrize("name", ["", "A", "a_b", "a" * 64, "a\n", "retain", "ä"])
def test_unusable_names_are_refused(
    service: DomainService, name: str, bundles: TinyBundles
) -> None:
    with pytest.raises(DomainNameError):
        asyncio.run(service.activate(name, bundles.experts["domain-0"]))


def test_unknown_names_are_not_found(service: DomainService) -> None:
    with pytest.raises(DomainNotFoundError, match="none is active"):
        service.show("a")
    with pytest.raises(DomainNotFoundError):
        asyncio.run(service.revoke("a"))


def test_a_bad_bundle_never_reaches_the_engine(
    service: DomainService, engine: InMemoryEngine, bundles: TinyBundles, tmp_path: Path
) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(bundles.experts["domain-0"], torn)
    (torn / "weights.safetensors").write_bytes(b"other")

    with pytest.raises(BundleTamperedError):
        asyncio.run(service.activate("a", torn))
    with pytest.raises(BundleNotFoundError):
        asyncio.run(service.activate("a", tmp_path / "nothing"))
    with pytest.raises(BundleNotFoundError):
        asyncio.run(service.activate("a", tmp_path / ("long" * 100)))
    assert engine.switches == []


def test_a_failed_switch_leaves_everything_as_it_was(
    service: DomainService, engine: InMemoryEngine, bundles: TinyBundles
) -> None:
    async def run() -> None:
        await service.activate("a", bundles.experts["domain-0"])
        engine.failure = SwitchError("no worker could copy")
        with pytest.raises(SwitchError):
            await service.activate("b", bundles.experts["domain-1"])
        engine.failure = None
        assert service.is_trusted
        assert (service.epoch, [d.name for d in service.list()]) == (1, ["a"])
        done = await service.activate("b", bundles.experts["domain-1"])
        assert done.epoch == 2

    asyncio.run(run())


@pytest.mark.parametrize("failure", [EngineError("undone"), RuntimeError("bug")])
def test_an_unclear_switch_ends_trust_for_good(
    service: DomainService, engine: InMemoryEngine, bundles: TinyBundles, failure: Exception
) -> None:
    async def run() -> None:
        told: list[str] = []
        service.on_distrust.append(lambda: told.append("lost"))
        engine.failure = failure
        with pytest.raises(type(failure)):
            await service.activate("a", bundles.experts["domain-0"])
        engine.failure = None
        assert not service.is_trusted
        for _ in range(2):
            with pytest.raises(EngineError, match="Restart"):
                await service.activate("a", bundles.experts["domain-0"])
        assert told == ["lost"]
        assert service.status().distrust is not None

    asyncio.run(run())


@pytest.mark.parametrize("after_failure", [False, True])
def test_workers_that_apply_something_else_end_trust(
    service: DomainService, engine: InMemoryEngine, bundles: TinyBundles, after_failure: bool
) -> None:
    async def run() -> None:
        engine.lie = EngineState(epoch=1, digests=("sha256:other", None, None))
        if after_failure:
            engine.failure = SwitchError("rolled back, it says")
        with pytest.raises(EngineError, match="sha256:other"):
            await service.activate("a", bundles.experts["domain-0"])
        assert not service.is_trusted

    asyncio.run(run())


def test_a_cancelled_caller_leaves_a_finished_change(
    service: DomainService, engine: InMemoryEngine, bundles: TinyBundles
) -> None:
    async def run() -> None:
        engine.gate = asyncio.Event()
        caller = asyncio.create_task(service.activate("a", bundles.experts["domain-0"]))
        while not engine.switches:
            await asyncio.sleep(0.01)
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert service.status().num_pending == 1
        engine.gate.set()
        await service.revoke("a")  # waits for its turn, after the change that nobody awaits
        assert service.is_trusted
        assert service.epoch == 2

    asyncio.run(run())


def test_concurrent_changes_run_one_after_another(
    service: DomainService, bundles: TinyBundles
) -> None:
    async def run() -> None:
        done = await asyncio.gather(
            *(service.activate(f"d{i}", bundles.experts[f"domain-{i}"]) for i in range(MAX_DOMAINS))
        )
        assert sorted(a.epoch for a in done) == [1, 2, 3]
        assert sorted(a.domain.slot for a in done) == [0, 1, 2]

    asyncio.run(run())


def test_it_serves_only_after_canary_and_start_up_domains(
    service: DomainService, bundles: TinyBundles
) -> None:
    async def run() -> None:
        assert not service.is_serving
        await service.start({"a": bundles.experts["domain-0"]})
        assert service.is_serving
        status = service.status()
        assert status.canary is not None
        assert (status.epoch, status.num_active) == (1, 1)

    asyncio.run(run())


def test_a_start_over_used_workers_is_refused(
    service: DomainService, engine: InMemoryEngine
) -> None:
    engine.epoch = 5
    with pytest.raises(EngineError, match="epoch 5"):
        asyncio.run(service.start({}))
    assert not service.is_serving


def test_only_figures_of_an_evaluation_are_kept(
    service: DomainService, write_expert: Callable[..., Path]
) -> None:
    evaluation: dict[str, Any] = {
        "forget": {"probability": 0.01, "sample": "secret text"},
        "note": "secret text",
        "rows": ["secret text"],
        "is_pinned": True,
    }
    done = asyncio.run(service.activate("a", write_expert(evaluation)))
    assert done.domain.evaluation == {"forget": {"probability": 0.01}, "is_pinned": True}
