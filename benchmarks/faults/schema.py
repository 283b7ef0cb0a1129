"""schemathesis over the admin side of one server, over the engine's double and SQLite."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

from benchmarks.admin_fuzz import fuzz_admin
from tests.support.tiny import TinyBundles

from .database import SqlitePlace
from .episode import MAX_DOMAINS
from .fleet import ADMIN_TOKEN, Fleet
from .settings import FaultSettings


def measure(bundles: TinyBundles, folder: Path, settings: FaultSettings) -> dict[str, Any]:
    """How much was sent, and what went wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return asyncio.run(_measure(bundles, folder, settings))


async def _measure(bundles: TinyBundles, folder: Path, settings: FaultSettings) -> dict[str, Any]:
    place = SqlitePlace(folder / "registry.sqlite")
    fleet = Fleet(place, folder, bundles.substrate, settings, max_domains=MAX_DOMAINS)
    try:
        replica = await fleet.add()
        await fleet.ready()
        report = await asyncio.to_thread(
            fuzz_admin,
            replica.url,
            ADMIN_TOKEN,
            random_seed=settings.seed,
            max_examples=settings.schema_examples,
        )
    finally:
        await fleet.close()
    return {
        "requests": report.requests,
        "operations": report.operations,
        "failures": len(report.failures),
        "found": report.failures[:50],
    }
