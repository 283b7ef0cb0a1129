"""Arrivals of a production trace, made to fit a small machine.

The trace is Azure's of conversations (2023, CC BY 4.0): when requests came, how long their prompts and
answers were. Where the file is not at hand, arrivals are drawn that have its rate and lengths.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import random
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from alter_core.errors import EvaluationError

TRACE_FILE = Path("traces") / "AzureLLMInferenceTrace_conv.csv"
"""Under `ALTER_DATA_DIR`."""
FIRST_REQUEST = 1000
"""Requests before it are left out: the trace begins in the middle of a lull."""

_RATE_PER_S = 5.53
_PROMPT_LOG_TOKENS = (6.633, 0.985)
_ANSWER_LOG_TOKENS = (5.019, 0.859)
"""The whole trace's mean rate, and mean and deviation of the logarithms of its lengths."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrival:
    """One request."""

    at_s: float
    """Seconds after the first."""
    prompt_tokens: int
    answer_tokens: int


def read_trace(path: Path, count: int) -> list[Arrival]:
    """The trace's requests from `FIRST_REQUEST` on. Raises: EvaluationError if there are too few."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(itertools.islice(csv.DictReader(file), FIRST_REQUEST, FIRST_REQUEST + count))
    if len(rows) < count:
        raise EvaluationError(
            f"{path} does not hold enough requests",
            expected=f"at least {FIRST_REQUEST + count}",
            got=f"{FIRST_REQUEST + len(rows)} or fewer",
        )
    # The trace has seven digits of seconds, one more than datetime takes.
    times = [datetime.fromisoformat(row["TIMESTAMP"][:26]) for row in rows]
    return [
        Arrival(
            at_s=(time - times[0]).total_seconds(),
            prompt_tokens=int(row["ContextTokens"]),
            answer_tokens=int(row["GeneratedTokens"]),
        )
        for time, row in zip(times, rows, strict=True)
    ]


def poisson_arrivals(count: int, *, seed: int) -> list[Arrival]:
    """Arrivals of a Poisson process of the trace's rate, with log-normal lengths of its parameters."""
    drawn = random.Random(seed)
    time, arrivals = 0.0, []
    for _ in range(count):
        arrivals.append(
            Arrival(
                at_s=time,
                prompt_tokens=max(1, round(drawn.lognormvariate(*_PROMPT_LOG_TOKENS))),
                answer_tokens=max(1, round(drawn.lognormvariate(*_ANSWER_LOG_TOKENS))),
            )
        )
        time += drawn.expovariate(_RATE_PER_S)
    return arrivals


def arrivals_of(data_dir: Path, count: int, *, seed: int) -> tuple[list[Arrival], str]:
    """The trace's arrivals, or drawn ones where it is not there; and which of the two, in words."""
    path = data_dir / TRACE_FILE
    if path.exists():
        return read_trace(path, count), "the Azure conversation trace's"
    drawn = poisson_arrivals(count, seed=seed)
    return drawn, "a Poisson process of the Azure conversation trace's rate and lengths"


def scaled_lengths(
    arrivals: Sequence[Arrival], *, divisor: int, prompt_tokens: range, answer_tokens: range
) -> list[Arrival]:
    """The same with lengths divided, and kept within the two ranges."""
    return [
        dataclasses.replace(
            arrival,
            prompt_tokens=_within(arrival.prompt_tokens // divisor, prompt_tokens),
            answer_tokens=_within(arrival.answer_tokens // divisor, answer_tokens),
        )
        for arrival in arrivals
    ]


def at_rate(arrivals: Sequence[Arrival], rate_per_s: float) -> list[Arrival]:
    """The same with times stretched until the mean rate is the given one: bursts stay bursts."""
    whole = arrivals[-1].at_s - arrivals[0].at_s
    factor = (len(arrivals) - 1) / rate_per_s / whole
    return [
        dataclasses.replace(arrival, at_s=(arrival.at_s - arrivals[0].at_s) * factor)
        for arrival in arrivals
    ]


def _within(value: int, allowed: range) -> int:
    return min(max(value, allowed.start), allowed.stop - 1)
