"""How long it takes from the moment the slowest server applies a change to the moment it is called active."""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path
from typing import Any

from alter_core.substrate import Substrate
from server.engine.base import SwitchReport
from server.parts import Parts, deployment_of
from server.registry import BundleStore, Registry
from tests.support import postgres
from tests.support.engine_double import EngineDouble
from tests.support.tiny import TinyBundles

from .settings import FaultSettings

MAX_DOMAINS = 4
DATABASE = "barrier"
WARM_UP = 5


class _TimedEngine(EngineDouble):
    """Notes when each switch ended."""

    applied_at: float = 0.0

    async def switch(self, **asked: Any) -> SwitchReport:
        """See `ForgetEngine.switch`."""
        report = await super().switch(**asked)
        self.applied_at = time.monotonic()
        return report


def measure(bundles: TinyBundles, folder: Path, settings: FaultSettings) -> list[float]:
    """Milliseconds, one for each change; the servers share this process, PostgreSQL is another."""
    with postgres.server() as server:
        postgres.execute(str(server.folder), f"CREATE DATABASE {DATABASE} TEMPLATE template0")
        url = f"postgresql://alter@/{DATABASE}?host={server.folder}"
        return asyncio.run(_measure(url, bundles, folder, settings))


async def _measure(
    url: str, bundles: TinyBundles, folder: Path, settings: FaultSettings
) -> list[float]:
    substrate = Substrate.read(bundles.substrate)
    servers = [_server(url, substrate, folder) for _ in range(settings.barrier_clients)]
    try:
        for parts, _ in servers:
            await parts.start({})
        took = [
            await _change(servers, done, bundles)
            for done in range(WARM_UP + settings.barrier_changes)
        ]
    finally:
        for parts, _ in servers:
            with contextlib.suppress(Exception):
                await parts.stop()
    return took[WARM_UP:]


def _server(url: str, substrate: Substrate, folder: Path) -> tuple[Parts, _TimedEngine]:
    engine = _TimedEngine(substrate, MAX_DOMAINS)
    parts = Parts.over(
        engine,
        substrate,
        Registry.open(url, deployment_of(substrate), max_domains=MAX_DOMAINS),
        BundleStore(str(folder / "store")),
        folder / "cache",
        max_domains=MAX_DOMAINS,
    )
    return parts, engine


async def _change(
    servers: list[tuple[Parts, _TimedEngine]], done: int, bundles: TinyBundles
) -> float:
    asked = servers[done % len(servers)][0].operations
    if done % 2:
        operation = await asked.revoke("authors")
    else:
        experts = list(bundles.experts.values())
        operation = await asked.activate("authors", experts[done // 2 % len(experts)])
    operation = await asked.wait(operation, 30)
    active_at = time.monotonic()
    if operation.state != "active":
        raise RuntimeError(f"a change is not active: {operation}")
    return 1000 * (active_at - max(engine.applied_at for _, engine in servers))
