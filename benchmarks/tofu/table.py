"""A results page with one line a variant: means over seeds, lowest and highest behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.results import write_results

from .experiment import Figures


def write_table(
    folder: Path,
    name: str,
    rows: Mapping[str, Sequence[Figures]],
    *,
    title: str,
    notes: Mapping[str, Any],
    columns: Sequence[str] | None = None,
    seed: int = 0,
) -> Path:
    """Writes `NAME.json` and `NAME.md`, all columns unless told which; a row has figures of every seed.

    A row without a column's figure has none in the file.
    """
    shown = columns or list(dict.fromkeys(key for found in rows.values() for key in found[0]))
    values = {(row, key): _known(found, key) for row, found in rows.items() for key in shown}
    return write_results(
        folder,
        name,
        title=title,
        figures={f"{r}/{k}": fmean(v) for (r, k), v in values.items() if v},
        spread={f"{r}/{k}": (min(v), max(v)) for (r, k), v in values.items() if len(v) > 1},
        seed=seed,
        notes=notes,
        table=_table(list(rows), shown, values),
    )


def _known(found: Sequence[Figures], key: str) -> list[float]:
    return [value for figures in found if (value := figures.get(key)) is not None]


def _table(
    rows: Sequence[str], columns: Sequence[str], values: Mapping[tuple[str, str], list[float]]
) -> str:
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row in rows:
        cells = [_cell(values[row, key]) for key in columns]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, low, high = (f"{value:.3g}" for value in (fmean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"
