"""Base and ours as servers, each a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from alter_cli.demo.server_process import RunningServer, run_server, serve
from server.client import AdminClient

from .artefacts import Artefacts, Family
from .processes import tree_memory_bytes
from .settings import BenchSettings

START_TIMEOUT_S = 900
"""Generous: two servers that start together on a busy machine trace and compile for minutes."""
MAX_MODEL_LEN = 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
    """A server that answers."""

    server: RunningServer
    start_s: float
    """From the start of its process to its first answer."""

    def memory_bytes(self) -> int:
        """Of all its processes."""
        return tree_memory_bytes(self.server.process.pid)

    @contextlib.contextmanager
    def admin(self) -> Iterator[AdminClient]:
        """Its admin side; ours has one."""
        with AdminClient(self.server.url, self.server.admin_token) as client:
            yield client


def _flags(settings: BenchSettings) -> list[str]:
    sizes = ["--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "64"]
    return [*sizes, "--dtype", settings.dtype]


@contextlib.contextmanager
def base_server(made: Artefacts, log: Path, settings: BenchSettings) -> Iterator[Started]:
    """vLLM as it comes."""
    command = [sys.executable, "-m", "benchmarks.serving.base_server", str(made.model)]
    command += _flags(settings)
    started = time.monotonic()
    with run_server(command, log) as server:
        server.wait_until_ready(START_TIMEOUT_S)
        yield Started(server=server, start_s=time.monotonic() - started)


@contextlib.contextmanager
def our_server(
    made: Artefacts, family: Family, log: Path, settings: BenchSettings, *, free_slots: int = 0
) -> Iterator[Started]:
    """`alter serve` with `num_domains` active from the start, named as their bundles are."""
    num_domains = settings.num_domains
    flags: Sequence[str] = [
        *_flags(settings),
        *("--alter-max-domains", str(num_domains + free_slots)),
        *(
            flag
            for bundle in family.experts[:num_domains]
            for flag in ("--alter-domain", f"{bundle.name}={bundle}")
        ),
    ]
    started = time.monotonic()
    with serve(made.model, family.substrate, log, flags) as server:
        server.wait_until_ready(START_TIMEOUT_S)
        yield Started(server=server, start_s=time.monotonic() - started)
