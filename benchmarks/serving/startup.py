"""Seconds and memory of a start of base and of ours, in turn: the startup block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .artefacts import Artefacts
from .servers import base_server, our_server
from .settings import BenchSettings


def measure(made: Artefacts, settings: BenchSettings, scratch: Path) -> dict[str, Any]:
    """Ours starts with its domains active, and proves itself with its canary before it answers."""
    family = made.family(settings.num_domains)
    found: dict[str, dict[str, list[float]]] = {
        name: {"start_s": [], "memory_bytes": []} for name in ("base", "ours")
    }
    for number in range(settings.startup_rounds):
        starts = {
            "base": base_server(made, scratch / f"base-{number}.log", settings),
            "ours": our_server(made, family, scratch / f"ours-{number}.log", settings),
        }
        for name, start in starts.items():
            with start as started:
                found[name]["start_s"].append(started.start_s)
                found[name]["memory_bytes"].append(started.memory_bytes())
    return {"num_domains": settings.num_domains, "rounds": found}
