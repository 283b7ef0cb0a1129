"""Many switches of one server, and what they leave in its memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.processes import tree_memory_bytes
from server.client import AdminClient

DOMAINS = ("authors", "places")
NUM_SAMPLES = 100
WARM_UP = 0.1
"""Of the switches come first and are not looked at: pools and caches fill."""


def churn(
    client: AdminClient, pid: int, bundles: Sequence[Path], num_switches: int
) -> dict[str, Any]:
    """Activates and revokes in turn; every change is waited for. `pid`: of the server."""
    warm_up = int(num_switches * WARM_UP)
    every = max(1, (num_switches - warm_up) // NUM_SAMPLES)
    samples: list[int] = []
    began = time.monotonic()
    for done in range(num_switches):
        turn, is_revocation = divmod(done, 2)
        name = DOMAINS[turn % len(DOMAINS)]
        if is_revocation:
            operation = client.revoke(name)
        else:
            operation = client.activate(name, str(bundles[turn % len(bundles)]))
        if operation.state != "active" or operation.epoch != done + 1:
            raise RuntimeError(f"switch {done + 1} is not active: {operation}")
        if done >= warm_up and (done - warm_up) % every == 0:
            samples.append(tree_memory_bytes(pid))
    return {
        "switches": num_switches,
        "seconds": time.monotonic() - began,
        "memory_growth_ratio": growth_ratio(samples),
        "memory_bytes": samples,
    }


def growth_ratio(samples: Sequence[int]) -> float:
    """The end over the beginning, each the median of a tenth of the samples."""
    count = max(1, len(samples) // 10)
    return statistics.median(samples[-count:]) / statistics.median(samples[:count])
