"""Episodes side by side. Each that is through is kept, so an interrupted run goes on where it stopped."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.results import keep
from tests.support import postgres
from tests.support.tiny import TinyBundles

from .episode import run_episode
from .settings import FaultSettings


def run_all(bundles: TinyBundles, folder: Path, settings: FaultSettings) -> list[dict[str, Any]]:
    """The results of as many episodes as it takes, those that were kept among them."""
    lanes = Lanes(bundles, folder, settings)
    if lanes.num_faults < settings.faults:
        with contextlib.ExitStack() as stack:
            servers = [
                stack.enter_context(postgres.server()) for _ in range(max(1, settings.lanes))
            ]
            asyncio.run(lanes.run(servers))
    return [lanes.results[index] for index in sorted(lanes.results)]


class Lanes:
    """Episodes that were run, and those that run side by side."""

    def __init__(self, bundles: TinyBundles, folder: Path, settings: FaultSettings) -> None:
        self._bundles = bundles
        self._folder = folder
        self._settings = settings
        self.results: dict[int, dict[str, Any]] = {}
        for path in folder.glob("episode-*.json"):
            result = json.loads(path.read_text("utf-8"))
            self.results[result["episode"]] = result
        self._numbers = (n for n in itertools.count() if n not in self.results)

    @property
    def num_faults(self) -> int:
        """Injected so far."""
        return sum(sum(result["faults"].values()) for result in self.results.values())

    async def run(self, servers: list[postgres.Server]) -> None:
        """One lane for each server, until enough is injected."""
        # Calls that wait for a process or a lock must not hold up other lanes.
        executor = ThreadPoolExecutor(16 * len(servers))
        asyncio.get_running_loop().set_default_executor(executor)
        async with asyncio.TaskGroup() as group:
            for server in servers:
                group.create_task(self._lane(server))

    async def _lane(self, server: postgres.Server) -> None:
        while self.num_faults < self._settings.faults:
            index = next(self._numbers)
            # Every third on SQLite: PostgreSQL is what fleets use.
            own = None if index % 3 == 0 else server
            scratch = self._folder / f"scratch-{index}"
            result = await run_episode(index, self._bundles, scratch, self._settings, own)
            keep(self._folder / f"episode-{index:03}.json", result)
            self.results[index] = result
            print(_line(result), file=sys.stderr, flush=True)


def _line(result: dict[str, Any]) -> str:
    faults = sum(result["faults"].values())
    worst = max(result["recovery_s"], default=0.0)
    return (
        f"episode {result['episode']} on {result['database']}: {faults} faults, "
        f"{result['tokens_checked']} tokens, {result['tokens_without_active_domain']} wrong, "
        f"{result['acknowledged_changes_lost']} lost, worst recovery {worst:.1f} s, "
        f"{result['seconds']:.0f} s{'; DEFECTS: ' if result['defects'] else ''}"
        f"{'; '.join(result['defects'])[:2000]}"
    )
