"""One fleet from its founding to its end: changes, faults around them, and what came of it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from alter_core.bundle import read_manifest
from tests.support import postgres
from tests.support.tiny import TinyBundles

from .database import Place, PostgresPlace, SqlitePlace
from .fleet import Answer, Fleet, NotReadyError, Replica
from .injectors import INJECTORS, Scene, choose
from .settings import FaultSettings

DOMAINS = ("authors", "places", "novels")
MAX_DOMAINS = 4
SETTLED = frozenset(
    (
        httpx.codes.NOT_FOUND,
        httpx.codes.CONFLICT,
        httpx.codes.PRECONDITION_FAILED,
        httpx.codes.UNPROCESSABLE_ENTITY,
    )
)
"""Answers that a repetition would not change."""
_FIRST_TRY_S = 1.0
_SETTLE_TIMEOUT_S = 60.0


async def run_episode(
    index: int,
    bundles: TinyBundles,
    folder: Path,
    settings: FaultSettings,
    server: postgres.Server | None,
) -> dict[str, Any]:
    """The figures of an episode. `folder` is made, and removed if all went well."""
    chance = random.Random(f"{settings.seed}/{index}")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    place = await _place(index, folder, server)
    fleet = Fleet(place, folder, bundles.substrate, settings, max_domains=MAX_DOMAINS)
    by_digest = {read_manifest(path).digest: path for path in bundles.experts.values()}
    scene = Scene(
        fleet=fleet,
        bundles=by_digest,
        settings=settings,
        random=chance,
        server=server,
        injectors=INJECTORS[place.kind],
    )
    episode = Episode(scene)
    try:
        start_s = [await episode.found() for _ in range(settings.replicas)]
        fleet.watch()
        await episode.rounds(settings.rounds)
        result = {**await episode.result(), "start_s": start_s}
    finally:
        await fleet.close()
        await place.close()
    if not result["defects"] and not result["violations"]:
        shutil.rmtree(folder)
    return {"episode": index, "database": place.kind, **result}


async def _place(index: int, folder: Path, server: postgres.Server | None) -> Place:
    if server is None:
        return SqlitePlace(folder / "registry.sqlite")
    place = PostgresPlace(server.folder, f"episode_{index}", server.folder / f"proxies-{index}")
    await place.create()
    return place


class Episode:
    """See the module."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._fleet = scene.fleet
        self._recovery_s: list[float] = []
        self._after: list[list[str]] = []
        """The faults before each recovery."""
        self._outcomes: Counter[str] = Counter()
        self._recorded: list[Answer] = []
        self._began = time.monotonic()

    async def found(self) -> float:
        """One more server, undisturbed; how long its start took."""
        replica = await self._fleet.add()
        return await self._fleet.ready(replica) - replica.started_at

    async def rounds(self, count: int) -> None:
        """So many changes, unless the fleet does not recover."""
        for _ in range(count):
            if not await self._survives(self._round):
                return
        await self._survives(self._end)

    async def rounds_until(self, num_faults: int) -> None:
        """As many as it takes, unless the fleet does not recover."""
        while self._scene.counts.total() < num_faults:
            if not await self._survives(self._round):
                return
        await self._survives(self._end)

    async def result(self) -> dict[str, Any]:
        """What has come of it."""
        await self._fleet.check()
        log = await asyncio.to_thread(self._fleet.log)
        ledger = self._fleet.ledger
        return {
            "seconds": time.monotonic() - self._began,
            "faults": dict(self._scene.counts),
            "tokens_checked": ledger.num_tokens,
            "tokens_without_active_domain": ledger.num_violations,
            "violations": ledger.violations,
            "acknowledged_changes": len(ledger.acknowledged),
            "acknowledged_changes_lost": len(ledger.lost(log)),
            "recorded_changes": len(log),
            "recovery_s": self._recovery_s,
            "slowest": sorted(zip(self._recovery_s, self._after, strict=True), reverse=True)[:3],
            "answers": dict(self._outcomes),
            "defects": self._scene.defects,
        }

    async def _survives(self, step: Callable[[], Awaitable[None]]) -> bool:
        try:
            await step()
            await self._fleet.check()
        except Exception as error:  # the other fleets go on, and the report says so
            self._scene.defects.append(f"{type(error).__name__}: {error}")
            return False
        return True

    async def _end(self) -> None:
        """Every change that was acknowledged becomes active."""
        for answer in self._recorded:
            await self._fleet.active(answer)

    async def _round(self) -> None:
        scene, chance = self._scene, self._scene.random
        scene.struck.clear()
        scene.operator = chance.choice(self._fleet.replicas)
        log = await asyncio.to_thread(self._fleet.log)
        operators = (scene.operator, chance.choice(self._fleet.replicas))
        intents = self._intents(log)
        low, high = scene.settings.faults_of_a_round
        faults = choose(scene.injectors, chance.randint(low, high), chance)
        async with contextlib.AsyncExitStack() as stack:
            for fault in faults:
                await stack.enter_async_context(fault(scene))
            first = [
                asyncio.create_task(intent.ask(operator, _FIRST_TRY_S))
                for intent, operator in zip(intents, operators, strict=False)
            ]
            await asyncio.wait(first)
        lifted = time.monotonic()
        await self._fleet.ready()
        self._recovery_s.append(time.monotonic() - lifted)
        self._after.append(sorted(fault.__name__ for fault in faults))
        for joined in scene.joined:
            await self._fleet.remove(joined)
        scene.joined.clear()
        answers = [await self._settled(intent) for intent in intents]
        self._judge(intents, answers)
        self._recorded += [answer for answer in answers if answer.is_recorded]

    def _intents(self, log: Any) -> list[_Intent]:
        """One operator, or two that race."""
        chance, fleet = self._scene.random, self._fleet
        domains: dict[str, str] = {}
        for change in log:
            domains.pop(change.domain, None)
            if change.bundle_digest is not None:
                domains[change.domain] = change.bundle_digest
        free = sorted(self._scene.bundles.keys() - set(domains.values()))
        head = {"If-Match": f'"{len(log)}"'}

        def intent(headers: Mapping[str, str]) -> _Intent:
            name = chance.choice(DOMAINS)
            if name in domains and chance.random() < 0.5:
                return _Intent(fleet, chance, name, None, headers)
            bundle = self._scene.bundles[chance.choice(free)]
            return _Intent(fleet, chance, name, bundle, headers)

        kind = chance.choices(("one", "race", "repeated"), (6, 3, 2))[0]
        if kind == "race":
            self._scene.counts["two operators race"] += 1
            return [intent(head), intent(head)]
        first = intent({"Prefer": "wait=1"} if chance.random() < 0.3 else {})
        if kind == "one":
            return [first]
        self._scene.counts["request repeated at once"] += 1
        return [first, first.again()]

    async def _settled(self, intent: _Intent) -> Answer:
        """Repeats a request, with its key, until somebody has decided it."""
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        while not (intent.answer.is_recorded or intent.answer.status in SETTLED):
            self._outcomes[f"{intent.answer.status} repeated"] += 1
            if time.monotonic() > deadline:
                raise NotReadyError(f"a change is not decided: {intent.answer}")
            await intent.ask(self._scene.random.choice(self._fleet.replicas), 5.0)
            await asyncio.sleep(0.05)
        self._outcomes[str(intent.answer.status)] += 1
        return intent.answer

    def _judge(self, intents: list[_Intent], answers: list[Answer]) -> None:
        if len(intents) < 2:
            return
        first, second = answers
        if intents[0].key == intents[1].key:
            if first.body.get("id") != second.body.get("id"):
                self._scene.defects.append(f"one key, two operations: {first.body} {second.body}")
        elif first.is_recorded and second.is_recorded:
            self._scene.defects.append(f"two operators won one epoch: {first.body} {second.body}")
        elif not first.is_recorded and not second.is_recorded:
            self._scene.defects.append(f"two operators lost one epoch: {first.body} {second.body}")


class _Intent:
    """What an operator wants, until somebody has decided it."""

    def __init__(
        self,
        fleet: Fleet,
        chance: random.Random,
        name: str,
        bundle: Path | None,
        headers: Mapping[str, str],
    ) -> None:
        self._fleet = fleet
        self._chance = chance
        self._name = name
        self._bundle = bundle
        self._headers = headers
        self.key = str(uuid.UUID(int=chance.getrandbits(128)))
        self.answer = Answer(0, {})

    def again(self) -> _Intent:
        """The same request, with the same key."""
        twin = _Intent(self._fleet, self._chance, self._name, self._bundle, self._headers)
        twin.key = self.key
        return twin

    async def ask(self, replica: Replica, timeout_s: float) -> None:
        """Asks once."""
        self.answer = await self._fleet.change(
            replica,
            self._name,
            self._bundle,
            timeout_s=timeout_s,
            headers={**self._headers, "Idempotency-Key": self.key},
        )
