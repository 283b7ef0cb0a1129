"""How many tokens each domain's expert has computed lately on this server, as far as somebody was looking."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Mapping

SAMPLE_S = 5.0
"""At most one sample in so many seconds."""
WINDOW_S = 900.0

WIDTH, HEIGHT = 180, 28
_MARGIN = 2


class RoutedTokenHistory:
    """Totals at the times when the page of domains was shown, or showed itself anew."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, dict[str, int]]] = deque()

    def note(self, totals: Mapping[str, int], *, now: float | None = None) -> None:
        """Takes a sample, unless the latest one is very recent. `now`: seconds, monotonic."""
        now = time.monotonic() if now is None else now
        while self._samples and now - self._samples[0][0] > WINDOW_S:
            self._samples.popleft()
        if not self._samples or now - self._samples[-1][0] >= SAMPLE_S:
            self._samples.append((now, dict(totals)))

    def rates(self, name: str) -> tuple[tuple[float, float], ...]:
        """Seconds before the latest sample, and tokens per second since the one before; oldest first."""
        found = [(at, totals[name]) for at, totals in self._samples if name in totals]
        return tuple(
            # A bundle that replaces another one begins at 0.
            (at - found[-1][0], max(0, total - before) / (at - since))
            for (since, before), (at, total) in itertools.pairwise(found)
        )


def sparkline(rates: tuple[tuple[float, float], ...]) -> str:
    """Points of an SVG polyline over WINDOW_S, now at the right; empty without two rates."""
    if len(rates) < 2:
        return ""
    highest = max(rate for _, rate in rates) or 1.0
    room = HEIGHT - 2 * _MARGIN
    return " ".join(
        f"{WIDTH * (1 + at / WINDOW_S):.1f},{HEIGHT - _MARGIN - room * rate / highest:.1f}"
        for at, rate in rates
    )
