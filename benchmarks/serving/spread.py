"""What several rounds of one measurement say together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Self

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
    """Median, lowest and highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Self:
        """Of one value a round."""
        found = sorted(values)
        return cls(median=median(found), low=found[0], high=found[-1])


def ratios(values: Sequence[float], references: Sequence[float]) -> Spread:
    """Of each round's value over the same round's reference: what slows a round down slows both.

    `values` may be of the first rounds only.
    """
    return Spread.of(v / r for v, r in zip(values, references[: len(values)], strict=True))


def percentile(values: Sequence[float], percent: float) -> float:
    """Interpolated between neighbours, as vLLM's own benchmark does."""
    return float(np.percentile(values, percent))
