"""A results page with one line a variant: means over seeds, lowest and highest behind. And its plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from benchmarks.results import write_results

from .experiment import Figures

mpl.use("Agg")

_SAME_DISTRIBUTION = 0.05


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
        table=figure_table(rows, shown),
    )


def figure_table(rows: Mapping[str, Sequence[Figures]], columns: Sequence[str]) -> str:
    """Markdown with one line a row: means over seeds, lowest and highest behind."""
    lines = [f"| | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for row, found in rows.items():
        cells = [_cell(_known(found, key)) for key in columns]
        lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_trade_off(path: Path, rows: Mapping[str, Sequence[Figures]]) -> None:
    """Draws forget_quality against model_utility, a dot a seed: the paper's Fig. 4. PNG."""
    figure, axis = plt.subplots(figsize=(6.4, 4.4))
    for name, found in rows.items():
        points = list(
            zip(_known(found, "forget_quality"), _known(found, "model_utility"), strict=True)
        )
        axis.scatter([quality for quality, _ in points], [kept for _, kept in points], s=16)
        axis.annotate(name, points[0], xytext=(4, 3), textcoords="offset points", fontsize=7)
    axis.axvline(_SAME_DISTRIBUTION, color="grey", linestyle="--")
    axis.set_xscale("log")
    axis.set_ylim(0, 1)
    axis.set_xlabel("forget_quality, KS p against the retrained model")
    axis.set_ylabel("model_utility")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _known(found: Sequence[Figures], key: str) -> list[float]:
    return [value for figures in found if (value := figures.get(key)) is not None]


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, low, high = (f"{value:.3g}" for value in (fmean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"
