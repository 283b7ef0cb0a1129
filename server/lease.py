"""For how long this server may still generate, by a clock that nobody can set."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], float]
"""Seconds since some moment; never set, and not stopped while the machine sleeps."""


def boot_clock() -> float:
    """Seconds since the machine started, those of its sleep included. `time.monotonic` would leave them
    out, and a laptop or a suspended virtual machine would wake up with a lease that others saw end."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class HeldLease:
    """The lease of this process, as the registry granted it: durations, each from before it was asked for."""

    def __init__(self, clock: Clock = boot_clock) -> None:
        self._clock = clock
        self._ends = float("-inf")

    def now(self) -> float:
        """To be taken before the registry is asked."""
        return self._clock()

    def extend(self, asked_at: float, duration_s: float) -> None:
        """Takes what was granted; it never ends a longer lease."""
        if duration_s > 0:
            self._ends = max(self._ends, asked_at + duration_s)

    def drop(self) -> None:
        """Gives the lease up: nothing may be generated until there is another."""
        self._ends = float("-inf")

    @property
    def left_s(self) -> float:
        """0 once it has run out."""
        return max(0.0, self._ends - self._clock())

    @property
    def is_held(self) -> bool:
        """True while this server may generate."""
        return self._clock() < self._ends
