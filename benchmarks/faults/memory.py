"""How much memory a process and its children have."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path


def tree(pid: int) -> list[int]:
    """The process and all that descend from it."""
    found, at = [pid], 0
    while at < len(found):
        for task in Path(f"/proc/{found[at]}/task").glob("*/children"):
            found += [int(child) for child in task.read_text().split()]
        at += 1
    return found


def used_bytes(pid: int) -> int:
    """Of the process and all that descend from it; what several share is counted once."""
    return sum(_proportional_bytes(each) for each in tree(pid))


def growth_ratio(samples: Sequence[int]) -> float:
    """The end over the beginning, each the median of a tenth of the samples."""
    count = max(1, len(samples) // 10)
    return statistics.median(samples[-count:]) / statistics.median(samples[:count])


def _proportional_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
