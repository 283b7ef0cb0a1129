"""The table that torch's profiler prints."""

from __future__ import annotations

import dataclasses
import re

_COLUMN = re.compile(r"\s{2,}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operator:
    """One line of the profiler's table. Shares are of the whole profile, 0 to 1."""

    name: str
    self_share: float
    """Without what it calls."""
    total_share: float
    """With what it calls."""
    calls: int


def read_table(text: str) -> list[Operator]:
    """Operators of a table that torch's profiler printed, in its order."""
    lines = [_COLUMN.split(line.strip()) for line in text.splitlines()]
    header = next(columns for columns in lines if columns[0] == "Name")
    places = [header.index(c) for c in ("Self CPU %", "CPU total %", "# of Calls")]
    found = []
    for columns in lines[lines.index(header) + 1 :]:
        if len(columns) == len(header) and columns[0].strip("-"):
            self_share, total_share, calls = (columns[place] for place in places)
            found.append(
                Operator(
                    name=columns[0],
                    self_share=float(self_share.rstrip("%")) / 100,
                    total_share=float(total_share.rstrip("%")) / 100,
                    calls=int(calls),
                )
            )
    return found
