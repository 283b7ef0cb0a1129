"""How long it takes from the moment the slowest server applies a change to the moment it is called active."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from alter_core.substrate import Substrate
from server.engine.base import SwitchReport
from server.parts import Parts, deployment_of
from server.registry import BundleStore, Registry
from tests.support import postgres
from tests.support.engine_double import EngineDouble
from tests.support.tiny import TinyBundles

from .fleet import processes
from .settings import FaultSettings

MAX_DOMAINS = 4
DATABASE = "barrier"
DOMAIN = "authors"
WARM_UP = 5
START_TIMEOUT_S = 60.0
CHANGE_TIMEOUT_S = 30.0


@dataclasses.dataclass(frozen=True)
class _Change:
    """Order to one server: have the fleet apply a bundle, or with None revoke it. Answer: `_Active`."""

    bundle: Path | None


@dataclasses.dataclass(frozen=True)
class _Active:
    """The change has come to an end for who asked for it."""

    state: str
    at: float
    """On the monotonic clock, which the processes share."""


class _WhenApplied:
    """Order to every server: say when its last switch ended."""


class _TimedEngine(EngineDouble):
    """Notes when each switch ended."""

    applied_at: float = 0.0

    async def switch(self, **asked: Any) -> SwitchReport:
        """See `ForgetEngine.switch`."""
        report = await super().switch(**asked)
        self.applied_at = time.monotonic()
        return report


def measure(bundles: TinyBundles, folder: Path, settings: FaultSettings) -> list[float]:
    """Milliseconds, one for each change; every server and PostgreSQL are processes of their own."""
    with postgres.server() as server, contextlib.ExitStack() as stack:
        postgres.execute(str(server.folder), f"CREATE DATABASE {DATABASE} TEMPLATE template0")
        url = f"postgresql://alter@/{DATABASE}?host={server.folder}"
        servers = [
            stack.enter_context(_server(url, bundles.substrate, folder))
            for _ in range(settings.barrier_clients)
        ]
        for orders in servers:
            _answer(orders, START_TIMEOUT_S)
        experts = list(bundles.experts.values())
        took = []
        for done in range(WARM_UP + settings.barrier_changes):
            asked = servers[done % len(servers)]
            asked.send(_Change(None if done % 2 else experts[done // 2 % len(experts)]))
            active: _Active = _answer(asked, 2 * CHANGE_TIMEOUT_S)
            if active.state != "active":
                raise RuntimeError(f"change {done} is {active.state}")
            for orders in servers:
                orders.send(_WhenApplied())
            applied_at = max(_answer(orders, CHANGE_TIMEOUT_S) for orders in servers)
            took.append(1000 * (active.at - applied_at))
        return took[WARM_UP:]


@contextlib.contextmanager
def _server(url: str, substrate: Path, folder: Path) -> Iterator[Connection]:
    ours, theirs = processes.Pipe()
    process = processes.Process(target=_run, args=(url, substrate, folder, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()  # which ends it
        process.join(CHANGE_TIMEOUT_S)
        process.kill()


def _answer(orders: Connection, timeout_s: float) -> Any:
    if not orders.poll(timeout_s):
        raise TimeoutError(f"a server did not answer within {timeout_s:.0f} s")
    return orders.recv()


def _run(url: str, substrate: Path, folder: Path, orders: Connection) -> None:
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError):
        asyncio.run(_serve(url, Substrate.read(substrate), folder, orders))


async def _serve(url: str, substrate: Substrate, folder: Path, orders: Connection) -> None:
    engine = _TimedEngine(substrate, MAX_DOMAINS)
    parts = Parts.over(
        engine,
        substrate,
        Registry.open(url, deployment_of(substrate), max_domains=MAX_DOMAINS),
        BundleStore(str(folder / "store")),
        folder / "cache",
        max_domains=MAX_DOMAINS,
    )
    try:
        await parts.start({})
        orders.send(None)
        while True:
            order = await asyncio.to_thread(orders.recv)
            if isinstance(order, _Change):
                orders.send(await _change(parts, order.bundle))
            else:
                orders.send(engine.applied_at)
    finally:
        await parts.stop()


async def _change(parts: Parts, bundle: Path | None) -> _Active:
    asked = parts.operations
    operation = await (asked.revoke(DOMAIN) if bundle is None else asked.activate(DOMAIN, bundle))
    operation = await asked.wait(operation, CHANGE_TIMEOUT_S)
    return _Active(operation.state, time.monotonic())
