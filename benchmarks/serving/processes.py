"""Processes and their memory, from /proc."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_PROC = Path("/proc")


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they started."""
    children: dict[int, list[int]] = {}
    for process, parent in _parents():
        children.setdefault(parent, []).append(process)
    found: list[int] = []
    waiting = [pid]
    while waiting:
        new = children.get(waiting.pop(), [])
        found += new
        waiting += new
    return found


def memory_bytes(pid: int) -> int:
    """Resident memory, a page that n processes share counted as an nth. 0 for a process that has ended."""
    with contextlib.suppress(OSError):
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def tree_memory_bytes(pid: int) -> int:
    """The same of a process and its descendants together."""
    return sum(map(memory_bytes, (pid, *descendants(pid))))


def _parents() -> Iterator[tuple[int, int]]:
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                # The command, in parentheses, may itself hold parentheses and spaces.
                after = (folder / "stat").read_text().rpartition(")")[2].split()
                yield int(folder.name), int(after[1])
