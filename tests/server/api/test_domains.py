"""What of the registry's changes a server applies, and what makes it lose its trust in the engine."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from alter_core.bundle import EVALUATION
from alter_core.errors import (
    BundleTamperedError,
    DomainNotFoundError,
    EngineError,
    NoFreeSlotError,
    SwitchError,
)
from alter_core.substrate import ForgetExpert, Substrate
from server.domains import DomainService
from server.engine.base import EngineState, InFlight
from server.registry import Change, DesiredState
from tests.support.tiny import TinyBundles

from .conftest import MAX_DOMAINS, InMemoryEngine


@pytest.fixture
def engine() -> InMemoryEngine:
    return InMemoryEngine(MAX_DOMAINS)


@pytest.fixture
def service(engine: InMemoryEngine, substrate: Substrate) -> DomainService:
    return DomainService(engine, substrate, MAX_DOMAINS)


class Changes:
    """Entries of a log, by the number of the bundle."""

    def __init__(self, bundles: TinyBundles, substrate: Substrate) -> None:
        self.folders = [bundles.experts[f"domain-{i}"] for i in range(MAX_DOMAINS + 1)]
        self.digests = [str(ForgetExpert.read(f, substrate).digest) for f in self.folders]

    def activation(
        self, epoch: int, name: str, number: int, slot: int = 0, in_flight: InFlight = "recompute"
    ) -> Change:
        return self._change(epoch, name, self.digests[number], slot, in_flight)

    def revocation(self, epoch: int, name: str, slot: int = 0) -> Change:
        return self._change(epoch, name, None, slot, "recompute")

    def _change(
        self, epoch: int, name: str, digest: str | None, slot: int, in_flight: InFlight
    ) -> Change:
        return Change(
            epoch=epoch,
            operation_id=f"operation-{epoch}",
            action="revoke" if digest is None else "activate",
            domain=name,
            bundle_digest=digest,
            slot=slot,
            in_flight=in_flight,
            actor="ann",
            request_id=None,
            reason=None,
            requested_at=datetime(2026, 1, 1, tzinfo=UTC),
        )

    async def folder(self, digest: str) -> Path:
        return self.folders[self.digests.index(digest)]


@pytest.fixture(scope="session")
def changes(bundles: TinyBundles, substrate: Substrate) -> Changes:
    return Changes(bundles, substrate)


def test_every_change_is_one_switch_to_its_epoch_in_its_slot(
    service: DomainService, engine: InMemoryEngine, changes: Changes
) -> None:
    async def run() -> None:
        report = await service.apply(changes.activation(1, "a", 0, 2), changes.folders[0])
        assert (report.epoch, service.epoch, service.show("a").slot) == (1, 1, 2)
        await service.apply(changes.activation(2, "a", 1, 2, "abort"), changes.folders[1])
        assert (service.show("a").digest, service.show("a").epoch) == (changes.digests[1], 2)
        await service.apply(changes.revocation(3, "a", 2), None)
        assert (service.epoch, service.list()) == (3, ())
        with pytest.raises(DomainNotFoundError, match="none is active"):
            service.show("a")

    asyncio.run(run())
    assert [(s["slot"], s["digest"], s["in_flight"]) for s in engine.switches] == [
        (2, changes.digests[0], "recompute"),
        (2, changes.digests[1], "abort"),
        (2, None, "recompute"),
    ]


def test_restoring_switches_only_what_differs(
    service: DomainService, engine: InMemoryEngine, changes: Changes
) -> None:
    async def run() -> None:
        for epoch, name, slot in ((1, "a", 0), (2, "b", 1), (3, "c", 2)):
            bundle = changes.folders[slot]
            await service.apply(changes.activation(epoch, name, slot, slot), bundle)
        del engine.switches[:]
        kept, other = changes.activation(1, "a", 0, 0), changes.activation(9, "d", 3, 2)
        await service.restore(DesiredState(epoch=12, domains=(kept, other)), changes.folder)
        assert (service.epoch, service.is_whole) == (12, True)
        assert [(d.name, d.epoch) for d in service.list()] == [("a", 1), ("d", 9)]
        assert [(s["slot"], s["digest"]) for s in engine.switches] == [
            (1, None),
            (2, changes.digests[3]),
        ]
        # Nothing to switch: the epoch alone moves, and the next change goes on from there.
        await service.restore(DesiredState(epoch=14, domains=(kept, other)), changes.folder)
        assert (service.epoch, engine.epoch) == (14, 5)
        await service.apply(changes.revocation(15, "a"), None)
        assert (service.epoch, engine.epoch) == (15, 15)

    asyncio.run(run())


def test_amid_a_restoration_no_epoch_is_whole(
    service: DomainService, engine: InMemoryEngine, changes: Changes
) -> None:
    async def run() -> None:
        desired = DesiredState(
            epoch=5,
            domains=(changes.activation(4, "a", 0, 0), changes.activation(5, "b", 1, 1)),
        )

        async def folder(digest: str) -> Path:
            if digest == changes.digests[1]:
                raise BundleTamperedError("torn")
            return await changes.folder(digest)

        with pytest.raises(BundleTamperedError):
            await service.restore(desired, folder)
        assert (service.epoch, service.is_whole, len(service.list())) == (0, False, 1)
        await service.restore(desired, changes.folder)
        assert (service.epoch, service.is_whole, len(engine.switches)) == (5, True, 2)

    asyncio.run(run())


def test_a_slot_that_this_server_lacks_is_refused(
    service: DomainService, engine: InMemoryEngine, changes: Changes
) -> None:
    with pytest.raises(NoFreeSlotError, match="slot 0 to 2"):
        asyncio.run(service.apply(changes.activation(1, "a", 0, 3), changes.folders[0]))
    assert engine.switches == []


def test_a_bundle_that_changed_never_reaches_the_engine(
    service: DomainService, engine: InMemoryEngine, changes: Changes, tmp_path: Path
) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(changes.folders[0], torn)
    (torn / EVALUATION).write_bytes(b"{}")
    for folder in (torn, changes.folders[1]):
        with pytest.raises(BundleTamperedError):
            asyncio.run(service.apply(changes.activation(1, "a", 0), folder))
    assert engine.switches == []


def test_a_failed_switch_leaves_everything_as_it_was(
    service: DomainService, engine: InMemoryEngine, changes: Changes
) -> None:
    async def run() -> None:
        await service.apply(changes.activation(1, "a", 0), changes.folders[0])
        engine.failure = SwitchError("no worker could copy")
        change = changes.activation(2, "b", 1, 1)
        with pytest.raises(SwitchError):
            await service.apply(change, changes.folders[1])
        engine.failure = None
        assert service.is_trusted
        assert (service.epoch, [d.name for d in service.list()]) == (1, ["a"])
        await service.apply(change, changes.folders[1])
        assert service.epoch == 2

    asyncio.run(run())


@pytest.mark.parametrize("failure", [EngineError("undone"), RuntimeError("bug")])
def test_an_unclear_switch_ends_trust_for_good(
    service: DomainService, engine: InMemoryEngine, changes: Changes, failure: Exception
) -> None:
    async def run() -> None:
        told: list[str] = []
        service.on_distrust.append(lambda: told.append("lost"))
        engine.failure = failure
        with pytest.raises(type(failure)):
            await service.apply(changes.activation(1, "a", 0), changes.folders[0])
        engine.failure = None
        assert not service.is_trusted
        for _ in range(2):
            with pytest.raises(EngineError, match="Restart"):
                await service.apply(changes.activation(1, "a", 0), changes.folders[0])
        assert told == ["lost"]
        assert service.status().distrust is not None

    asyncio.run(run())


@pytest.mark.parametrize("after_failure", [False, True])
def test_workers_that_apply_something_else_end_trust(
    service: DomainService, engine: InMemoryEngine, changes: Changes, after_failure: bool
) -> None:
    async def run() -> None:
        engine.lie = EngineState(epoch=1, digests=("sha256:other", None, None))
        if after_failure:
            engine.failure = SwitchError("rolled back, it says")
        with pytest.raises(EngineError, match="sha256:other"):
            await service.apply(changes.activation(1, "a", 0), changes.folders[0])
        assert not service.is_trusted

    asyncio.run(run())


def test_it_is_sound_only_after_the_canary(service: DomainService) -> None:
    async def run() -> None:
        assert not service.is_sound
        await service.start()
        assert service.is_sound
        assert service.status().canary is not None

    asyncio.run(run())


def test_a_start_over_used_workers_is_refused(
    service: DomainService, engine: InMemoryEngine
) -> None:
    engine.epoch = 5
    with pytest.raises(EngineError, match="epoch 5"):
        asyncio.run(service.start())
    assert not service.is_sound


def test_only_figures_of_an_evaluation_are_kept(
    service: DomainService,
    substrate: Substrate,
    changes: Changes,
    write_expert: Callable[..., Path],
) -> None:
    evaluation: dict[str, Any] = {
        "forget": {"probability": 0.01, "sample": "secret text"},
        "note": "secret text",
        "rows": ["secret text"],
        "is_pinned": True,
    }
    folder = write_expert(evaluation)
    digest = str(ForgetExpert.read(folder, substrate).digest)
    asyncio.run(service.apply(changes._change(1, "a", digest, 0, "recompute"), folder))
    assert service.show("a").evaluation == {"forget": {"probability": 0.01}, "is_pinned": True}
