"""What is measured, block by block, and what is kept of it.

A block is measured in a process of its own. Its result is kept as JSON under a name that holds a digest of
the settings and of the sources that it follows from, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from alter_cli.demo.artefacts import package_folder, sources
from alter_core.errors import EvaluationError
from server.engine import native

from .artefacts import Artefacts
from .settings import BenchSettings
from .traffic import TrafficKind

Result = dict[str, Any]
Measure = Callable[[Artefacts, BenchSettings, Path], Result]

_SHOWING = ("__init__", "__main__", "figures", "report", "plots", "profile", "operators")
"""Modules that no result follows from."""
_OF_SERVERS = ("base_server", "gaps", "online", "servers", "startup", "switch", "trace")
"""Modules that no result of an engine alone follows from."""
_LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""For every engine and server, base and ours, to leave less to chance: where a process finds its memory is
worth several percent of its speed."""
_ENGINE_PACKAGES = ("alter_core", "server.engine")
SERVER_PACKAGES = (*_ENGINE_PACKAGES, "server", "server.api", "server.audit", "server.registry")
"""All that a whole server follows from."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """One thing to measure on one model."""

    kind: str
    model: str
    measure: Measure
    has_server: bool
    """False for engines alone."""

    @property
    def name(self) -> str:
        """`KIND-MODEL`."""
        return f"{self.kind}-{self.model}"


def blocks_of(settings: BenchSettings) -> dict[str, Block]:
    """All blocks of a run, by name, the headline model's first."""
    of_engines: dict[str, Measure] = {
        "offline": _offline((settings.num_domains,), has_lora=True),
        "scale": _offline(
            (settings.few_domains, settings.many_domains), kinds=(TrafficKind.RETAIN,)
        ),
        **{f"n{count}": _offline((count,)) for count in settings.other_domains},
    }
    of_servers: dict[str, Measure] = {
        "switch": functools.partial(_switch, traffic=TrafficKind.MIXED),
        "switch_retain": functools.partial(_switch, traffic=TrafficKind.RETAIN),
        "activation": functools.partial(_switch, traffic=TrafficKind.MIXED, is_heavy=True),
        "startup": _startup,
        **{f"online_{kind}": functools.partial(_online, kind=kind) for kind in TrafficKind},
    }
    found = [
        Block(kind=kind, model=model, measure=measure, has_server=kind in of_servers)
        for model in reversed(settings.models)
        for kind, measure in (of_engines | of_servers).items()
    ]
    return {block.name: block for block in found}


# Imported where they are measured: each loads vLLM.


def _offline(
    num_domains: Sequence[int],
    *,
    kinds: Collection[TrafficKind] = tuple(TrafficKind),
    has_lora: bool = False,
) -> Measure:
    def measure(made: Artefacts, settings: BenchSettings, _: Path) -> Result:
        from . import offline

        return offline.measure(
            made, settings, num_domains=num_domains, kinds=kinds, has_lora=has_lora
        )

    return measure


def _online(
    made: Artefacts, settings: BenchSettings, scratch: Path, *, kind: TrafficKind
) -> Result:
    from . import online

    return online.measure(made, settings, scratch, kind=kind)


def _switch(
    made: Artefacts,
    settings: BenchSettings,
    scratch: Path,
    *,
    traffic: TrafficKind,
    is_heavy: bool = False,
) -> Result:
    from . import switch

    return switch.measure(made, settings, scratch, kind=traffic, is_heavy=is_heavy)


def _startup(made: Artefacts, settings: BenchSettings, scratch: Path) -> Result:
    from . import startup

    return startup.measure(made, settings, scratch)


class BlockCache:
    """Results by block, in one folder."""

    def __init__(self, folder: Path, settings: BenchSettings) -> None:
        self.folder = folder
        self.settings = settings

    def path(self, block: Block) -> Path:
        """Where a block's result is, or will be."""
        parts = (block.name, repr(self.settings), _measured_sources(block.has_server))
        digest = hashlib.sha256("\0".join(parts).encode())
        return self.folder / f"{block.name}-{digest.hexdigest()[:12]}.json"

    def read(self, block: Block) -> Result | None:
        """A block's result, if it was measured."""
        path = self.path(block)
        return json.loads(path.read_text("utf-8")) if path.exists() else None


@functools.cache
def _measured_sources(has_server: bool) -> str:
    here = package_folder("benchmarks.serving")
    others = _SHOWING if has_server else (*_SHOWING, *_OF_SERVERS)
    ours = [path for path in sorted(here.glob("*.py")) if path.stem not in others]
    packages = SERVER_PACKAGES if has_server else _ENGINE_PACKAGES
    texts = [path.read_text("utf-8") for path in ours]
    texts += [sources(package_folder(package)) for package in packages]
    texts += [path.read_text("utf-8") for path in native.sources()]
    return "\0".join(texts)


def measure_here(block: Block, settings: BenchSettings, folder: Path) -> Result:
    """Measures a block in this process; artefacts and logs go under `folder`."""
    scratch = folder / "logs" / block.name
    scratch.mkdir(parents=True, exist_ok=True)
    made = Artefacts.of(folder / "artefacts", block.model, seed=settings.seed)
    load_before, started = os.getloadavg()[0], time.monotonic()
    result = block.measure(made, settings, scratch)
    return result | {
        "seconds": round(time.monotonic() - started, 1),
        "load_before": round(load_before, 2),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def measure_apart(block: Block, cache: BlockCache, folder: Path, *, is_quick: bool) -> Result:
    """Measures a block in a process of its own, or takes what is kept.

    Raises: EvaluationError with the end of the log if the process fails.
    """
    if (kept := cache.read(block)) is not None:
        return kept
    log = folder / "logs" / f"{block.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "benchmarks.serving.block", block.name]
    command += ["--folder", str(folder), "--out", str(cache.path(block))]
    command += ["--rounds", str(cache.settings.rounds)]
    with log.open("wb") as output:
        finished = subprocess.run(
            [*command, *(["--quick"] if is_quick else [])],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | _LARGE_PAGES,
            check=False,
        )
    result = cache.read(block)
    if finished.returncode or result is None:
        end = "\n".join(log.read_text("utf-8", "replace").splitlines()[-20:])
        raise EvaluationError(
            f"The block {block.name} was not measured",
            got=f"exit code {finished.returncode}",
            fix=f"The end of {log}:\n{end}",
        )
    return result
