"""The faults. Each is begun around a change, and over when its block is left."""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
import signal
import sqlite3
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path

from alter_core.bundle import MANIFEST
from server.registry import BundleStore
from tests.support import postgres
from tests.support.engine_double import STEPS

from .database import PostgresPlace, SqlitePlace
from .fleet import Fleet, Replica
from .points import APPEND, APPENDED, KILL_POINTS
from .proxy import Proxy
from .settings import FaultSettings

WEIGHTS = "weights.safetensors"
_FIRES_WITHIN_S = 0.4


Injector = Callable[["Scene"], AbstractAsyncContextManager[None]]


@dataclass
class Scene:
    """Where a round of faults takes place."""

    fleet: Fleet
    bundles: dict[str, Path]
    """By digest."""
    settings: FaultSettings
    random: random.Random
    server: postgres.Server | None
    """None without PostgreSQL."""
    injectors: Mapping[Injector, float]
    """How often each is chosen, against the others."""
    restarts_for_torn_files: bool = True
    """Damage in the store is met by a server that starts; False: by one that lags."""
    counts: Counter[str] = field(default_factory=Counter)
    """Faults that were injected, by kind; what several servers have to bear counts for each of them."""
    operator: Replica | None = None
    """The server that takes the change of this round."""
    struck: set[str] = field(default_factory=set)
    """Servers that a fault of this round has to itself."""
    joined: list[Replica] = field(default_factory=list)
    """Servers that are to leave at the end of this round."""
    defects: list[str] = field(default_factory=list)
    """What must not have happened."""

    @property
    def proxies(self) -> list[Proxy]:
        """Between the servers of now and the database."""
        place = self.fleet.place
        assert isinstance(place, PostgresPlace)
        return [place.proxies[index] for index in range(len(self.fleet.replicas))]

    def victim(self, *, is_operator: bool = False) -> Replica | None:
        """A server that no other fault of this round has; None if there is none."""
        free = [r for r in self.fleet.replicas if r.name not in self.struck]
        if is_operator:
            free = [r for r in free if r is self.operator]
        if not free:
            return None
        found = self.random.choice(free)
        self.struck.add(found.name)
        return found


@contextlib.asynccontextmanager
async def killed_at_a_point(scene: Scene) -> AsyncIterator[None]:
    """kill -9 at one step of a change."""
    point = scene.random.choice(KILL_POINTS)
    victim = scene.victim(is_operator=point in (APPEND, APPENDED))
    if victim is None:
        yield
        return
    await victim.arm(point, "kill")
    try:
        yield
    finally:
        if await victim.gone(_FIRES_WITHIN_S):
            scene.counts[f"kill -9 at {point}"] += 1
            await scene.fleet.restart(victim)
        else:
            await victim.arm(point, None)


@contextlib.asynccontextmanager
async def killed(scene: Scene) -> AsyncIterator[None]:
    """kill -9 at any moment."""
    victim = scene.victim()
    if victim is None:
        yield
        return
    task = asyncio.create_task(_kill_later(victim, scene.random.uniform(0, 0.1)))
    try:
        yield
    finally:
        await task
        scene.counts["kill -9 at any moment"] += 1
        await scene.fleet.restart(victim)


async def _kill_later(victim: Replica, seconds: float) -> None:
    await asyncio.sleep(seconds)
    await asyncio.to_thread(victim.kill)


@contextlib.asynccontextmanager
async def failing_step(scene: Scene) -> AsyncIterator[None]:
    """A worker that fails in a step of the switch, and rolls back."""
    victim, step = scene.victim(), scene.random.choice(STEPS)
    if victim is None:
        yield
        return
    await victim.arm(step, "fail")
    try:
        yield
    finally:
        scene.counts[f"failed {step}"] += not await victim.arm(step, None)


@contextlib.asynccontextmanager
async def hanging(scene: Scene) -> AsyncIterator[None]:
    """A process that is stopped, for less or for more than its lease, and goes on as if nothing were."""
    victim = scene.victim()
    if victim is None:
        yield
        return
    is_long = scene.random.random() < 0.4
    lease_s = scene.settings.lease_s + scene.settings.margin_s
    victim.send_signal(signal.SIGSTOP)
    try:
        yield
        await asyncio.sleep(lease_s + 0.2 if is_long else 0.2)
    finally:
        victim.send_signal(signal.SIGCONT)
        scene.counts["hang beyond the lease" if is_long else "short hang"] += 1


@contextlib.asynccontextmanager
async def full_disk(scene: Scene) -> AsyncIterator[None]:
    """A process that can write no file."""
    victim = scene.victim()
    if victim is None or not victim.is_alive:
        yield
        return
    with victim.full_disk():
        yield
        await asyncio.sleep(scene.random.choice((0.0, 0.3)))
    scene.counts["disk full"] += 1


@contextlib.asynccontextmanager
async def torn_or_swapped(scene: Scene) -> AsyncIterator[None]:
    """A bundle in the store that is damaged, while a server that needs it starts."""
    victim = scene.victim() if scene.restarts_for_torn_files else None
    log = await asyncio.to_thread(scene.fleet.log)
    wanted = [c.bundle_digest for c in log[-3:] if c.bundle_digest in scene.bundles]
    digest = scene.random.choice(wanted or sorted(scene.bundles))
    assert digest is not None
    store = BundleStore(str(scene.fleet.store))
    await asyncio.to_thread(store.put, scene.bundles[digest])
    folder = scene.fleet.store / "sha256" / digest.removeprefix("sha256:")
    kind = damage(folder / scene.random.choice((WEIGHTS, MANIFEST)), scene)
    scene.counts[kind] += 1
    if victim is not None:
        scene.counts["kill -9 at any moment"] += 1
        await scene.fleet.restart(victim)
    try:
        yield
        await asyncio.sleep(0.2)
    finally:
        await asyncio.to_thread(store.put, scene.bundles[digest])


def damage(target: Path, scene: Scene) -> str:
    """Damages a file of a bundle; the kind."""
    chance = scene.random
    kind = chance.choice(("torn file", "flipped byte", "swapped file", "missing file"))
    data = target.read_bytes()
    if kind == "torn file":
        data = data[: chance.randrange(len(data))]
    elif kind == "flipped byte":
        at = chance.randrange(len(data))
        data = data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]
    elif kind == "swapped file":
        others = [bundle / target.name for bundle in scene.bundles.values()]
        data = chance.choice([d for p in others if (d := p.read_bytes()) != data])
    target.unlink()
    if kind != "missing file":
        target.write_bytes(data)
    return kind


@contextlib.asynccontextmanager
async def damaged_upload(scene: Scene) -> AsyncIterator[None]:
    """A damaged bundle that an operator asks for: it must be refused, whatever else goes on."""
    digest = scene.random.choice(sorted(scene.bundles))
    # Beside the sound ones: a place from where bundles may come.
    folder = scene.bundles[digest].with_name(f"damaged-{uuid.uuid4()}")
    shutil.copytree(scene.bundles[digest], folder)
    # Not the manifest: one that is altered and still holds together is another bundle, if nobody signs it.
    kind = damage(folder / WEIGHTS, scene)
    replica = scene.random.choice(scene.fleet.replicas)
    asked = asyncio.create_task(scene.fleet.change(replica, "damaged", folder, timeout_s=3))
    try:
        yield
    finally:
        answer = await asked
        shutil.rmtree(folder)
        scene.counts[f"{kind} uploaded"] += 1
        if answer.is_recorded:
            scene.defects.append(f"a damaged bundle was accepted: {kind}")


@contextlib.asynccontextmanager
async def joining(scene: Scene) -> AsyncIterator[None]:
    """A server that joins during the change; it is to become ready, and then dies."""
    joined = await scene.fleet.add()
    scene.struck.add(joined.name)
    scene.joined.append(joined)
    scene.counts["join during a switch"] += 1
    yield


def _outage_s(scene: Scene) -> float:
    """Mostly short, sometimes beyond every lease."""
    is_long = scene.random.random() < 0.15
    return scene.settings.lease_s if is_long else scene.random.uniform(0, 0.2)


@contextlib.asynccontextmanager
async def _registry_gone(
    scene: Scene, strike: Callable[[Proxy], None], kind: str
) -> AsyncIterator[None]:
    proxies = [p for p in scene.proxies if scene.random.random() < 0.6]
    for proxy in proxies:
        strike(proxy)
    try:
        yield
        await asyncio.sleep(_outage_s(scene))
    finally:
        for proxy in proxies:
            proxy.heal()
        scene.counts[kind] += len(proxies)


def registry_cut(scene: Scene) -> AbstractAsyncContextManager[None]:
    """Some servers, or all, lose their connections to the database and get no new ones."""
    return _registry_gone(scene, Proxy.cut, "registry down for a server")


def registry_held(scene: Scene) -> AbstractAsyncContextManager[None]:
    """The database of some servers neither answers nor refuses."""
    return _registry_gone(scene, Proxy.hold, "registry silent for a server")


@contextlib.asynccontextmanager
async def registry_slow(scene: Scene) -> AsyncIterator[None]:
    """Every answer of the database comes late."""
    proxies = scene.proxies
    for proxy in proxies:
        proxy.delay_s = scene.random.choice((0.02, 0.05, 0.1))
    try:
        yield
    finally:
        for proxy in proxies:
            proxy.heal()
        scene.counts["registry slow for a server"] += len(proxies)


@contextlib.asynccontextmanager
async def registry_crashed(scene: Scene) -> AsyncIterator[None]:
    """kill -9 of the whole database, and its recovery."""
    assert scene.server is not None
    await asyncio.sleep(scene.random.uniform(0, 0.05))
    task = asyncio.create_task(_crash_later(scene.server, scene.random.uniform(0, 0.1)))
    try:
        yield
    finally:
        await task
        await asyncio.to_thread(scene.server.start)
        scene.counts["registry killed"] += 1


async def _crash_later(server: postgres.Server, seconds: float) -> None:
    await asyncio.sleep(seconds)
    await asyncio.to_thread(server.kill)


@contextlib.asynccontextmanager
async def registry_locked(scene: Scene) -> AsyncIterator[None]:
    """Somebody holds the lock of the SQLite file, for less or for more than anybody waits."""
    place = scene.fleet.place
    assert isinstance(place, SqlitePlace)
    seconds = scene.random.choice((0.1, 0.3, scene.settings.timeout_s + 0.3))
    task = asyncio.create_task(_hold_lock(place, seconds))
    try:
        yield
    finally:
        if await task:
            kind = "slow" if seconds < scene.settings.timeout_s else "down"
            scene.counts[f"registry {kind} for a server"] += len(scene.fleet.replicas)


async def _hold_lock(place: SqlitePlace, seconds: float) -> bool:
    """False if a server that hangs has the lock."""
    try:
        async with place.locked():
            await asyncio.sleep(seconds)
    except sqlite3.OperationalError:
        return False
    return True


@contextlib.asynccontextmanager
async def notifications_lost(scene: Scene) -> AsyncIterator[None]:
    """Nobody is told of a change."""
    async with _notifications(scene, 0):
        yield


@contextlib.asynccontextmanager
async def notifications_repeated(scene: Scene) -> AsyncIterator[None]:
    """Everybody is told of a change many times, and of some that there are not."""
    place = scene.fleet.place
    assert isinstance(place, PostgresPlace)
    async with _notifications(scene, scene.random.choice((2, 5, 20))):
        yield
        with contextlib.suppress(Exception):  # the database may be down
            await place.notify(3)


@contextlib.asynccontextmanager
async def _notifications(scene: Scene, copies: int) -> AsyncIterator[None]:
    proxies = scene.proxies
    before = sum(proxy.num_notifications for proxy in proxies)
    for proxy in proxies:
        proxy.notification_copies = copies
    try:
        yield
        await asyncio.sleep(0.05)
    finally:
        touched = sum(proxy.num_notifications for proxy in proxies) - before
        for proxy in proxies:
            proxy.notification_copies = 1
        kind = "notification lost" if copies == 0 else "notification repeated"
        scene.counts[kind] += touched


@contextlib.asynccontextmanager
async def clock_jump(scene: Scene) -> AsyncIterator[None]:
    """The database's clock is set, there and back, from one end of the margin to the other at most."""
    place = scene.fleet.place
    assert isinstance(place, PostgresPlace)
    reach = 0.45 * scene.settings.margin_s
    with contextlib.suppress(Exception):  # the database may be down
        await place.set_clock(scene.random.choice((-reach, reach)))
        scene.counts["clock jump"] += 1
    yield


Weights = Mapping[Injector, float]
_EVERYWHERE: Weights = {
    hanging: 0.5,
    full_disk: 0.7,
    torn_or_swapped: 0.7,
    damaged_upload: 3.0,
}
_PROCESSES: Weights = {killed_at_a_point: 3.0, killed: 0.7, failing_step: 1.0, joining: 0.7}
_POSTGRESQL: Weights = {
    registry_cut: 1.0,
    registry_held: 0.5,
    registry_slow: 1.0,
    registry_crashed: 0.15,
    notifications_lost: 3.0,
    notifications_repeated: 3.0,
    clock_jump: 3.0,
}
INJECTORS: Mapping[str, Weights] = {
    "sqlite": {**_EVERYWHERE, **_PROCESSES, registry_locked: 1.0},
    "postgresql": {**_EVERYWHERE, **_PROCESSES, **_POSTGRESQL},
}
"""By kind of database: how often each is chosen, against the others."""
REAL: Weights = {**_EVERYWHERE, **_POSTGRESQL, killed: 0.5}
"""Where a start takes a minute or two."""


def choose(weights: Weights, count: int, chance: random.Random) -> list[Injector]:
    """Faults for a round, in the order in which they begin: those of the registry last, since they end
    first. One at most of those that would undo each other."""
    chosen: dict[str, Injector] = {}
    for injector in chance.choices(list(weights), list(weights.values()), k=count):
        name = injector.__name__
        group = name.split("_")[0] if name.startswith(("registry_", "notifications_")) else name
        chosen.setdefault(group, injector)
    return sorted(chosen.values(), key=lambda each: each.__name__.startswith("registry_"))
