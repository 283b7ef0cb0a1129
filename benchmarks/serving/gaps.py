"""Where a change lies in streams of tokens, and how long it held them up.

A change shows as the longest time between two tokens of a stream that it lies in. What a plain step takes,
the median over all gaps, is taken off.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence

from alter_core.errors import EngineError
from server.api.models import Switch

Span = tuple[float, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """One activation or revocation, by the client's clock, seconds."""

    is_activation: bool
    started: float
    ended: float
    switch: Switch
    """What the server says of it."""

    @property
    def span(self) -> Span:
        """From the request to the answer."""
        return self.started, self.ended

    @property
    def span_before(self) -> Span:
        """As long a time, right before the request."""
        return 2 * self.started - self.ended, self.started


@dataclasses.dataclass(frozen=True)
class Stream:
    """One request's tokens, by the client's clock, seconds."""

    prompt_tokens: int
    first_token: float
    gaps: Sequence[float]
    """From each token to the next."""

    @functools.cached_property
    def arrivals(self) -> list[float]:
        """When each token came."""
        return list(itertools.accumulate(self.gaps, initial=self.first_token))

    def gaps_across(self, span: Span) -> Iterable[float]:
        """Those that the span lies in, wholly or in part."""
        started, ended = span
        for gap, (earlier, later) in zip(self.gaps, itertools.pairwise(self.arrivals), strict=True):
            if later >= started and earlier <= ended:
                yield gap

    def tokens_at(self, moment: float) -> int:
        """Tokens, prompt included, of a stream that runs at that moment; 0 for one that does not."""
        if not self.arrivals[0] <= moment < self.arrivals[-1]:
            return 0
        return self.prompt_tokens + sum(arrival <= moment for arrival in self.arrivals)


def gap_beyond_step_s(streams: Sequence[Stream], span: Span, step_s: float) -> float:
    """Longest gap that a span lies in, beyond a plain step.

    Raises: EngineError if no stream ran across it.
    """
    gaps = [gap for stream in streams for gap in stream.gaps_across(span)]
    if not gaps:
        raise EngineError("No stream ran when a gap was looked for", got="no gap to measure")
    return max(gaps) - step_s
