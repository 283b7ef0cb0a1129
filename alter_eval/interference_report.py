"""The page of a measurement of interference, its figures and its heat map. Needs matplotlib.

out/interference.json   figures by name, and the conflicts above the threshold
out/interference.md     the same as tables
out/interference.png    the heat map
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from trainer.checkpoint import write_atomically

from .interference import Conflict, Interference
from .metrics import Values

JSON_FILE = "interference.json"
PAGE_FILE = "interference.md"
PLOT_FILE = "interference.png"
_MOST_NUMBERED = 8
"""Domains beyond which the heat map has colours alone."""
_LEAST_LIMIT = 0.01
"""Nats at which colours end, at least: rounding is not to look like harm."""


def write_interference(
    out: Path, found: Interference, threshold: float, what: Mapping[str, Any]
) -> Path:
    """Writes all three files; returns the page. `what` says what was measured."""
    conflicts = found.conflicts(threshold)
    content = {
        "what": what,
        "threshold": threshold,
        "conflicts": [dataclasses.asdict(conflict) for conflict in conflicts],
        **figures_of(found),
    }
    write_atomically(out / JSON_FILE, json.dumps(content, indent=1).encode() + b"\n")
    _heat_map(out / PLOT_FILE, found)
    page = "\n".join(_page(found, conflicts, threshold)) + "\n"
    write_atomically(out / PAGE_FILE, page.encode())
    return out / PAGE_FILE


def figures_of(found: Interference) -> dict[str, Any]:
    """The figures by name, matrices as [expert][domain]."""

    def named(values: Values) -> Any:
        inner = [named(row) for row in values] if values.ndim > 1 else values.tolist()
        return dict(zip(found.names, inner, strict=True))

    def fields(part: Any) -> dict[str, Any]:
        return {
            field.name: named(value) if isinstance(value, np.ndarray) else value
            for field in dataclasses.fields(part)
            for value in [getattr(part, field.name)]
        }

    return {
        "on_rows": fields(found.on_rows),
        "on_neighbours": None if found.on_neighbours is None else fields(found.on_neighbours),
        "forgetting": fields(found.forgetting),
        "route_overlap": named(found.route_overlap),
        "sites": fields(found.sites),
    }


def sentence(conflict: Conflict) -> str:
    """A conflict in words."""
    if conflict.on == "forgetting":
        return (
            f"{conflict.domain} forgets {conflict.loss:.3f} nats less beside the others than alone"
        )
    text = "rows" if conflict.on == "rows" else "retain neighbours"
    return f"{conflict.expert} adds {conflict.loss:.3f} nats to {text} of {conflict.domain}"


def _heat_map(path: Path, found: Interference) -> None:
    # Beside what an expert does to its own rows, which is its purpose, harm would not show.
    on_others = np.where(np.eye(len(found.names)), np.nan, found.on_rows.loss_change)
    matrices = [("loss on rows, change in nats", on_others)]
    if found.on_neighbours is not None:
        matrices.append(("loss on neighbours, change in nats", found.on_neighbours.loss_change))
    most = max(float(np.nanmax(np.abs(values))) for _, values in matrices)
    panels = [
        *((title, values, max(most, _LEAST_LIMIT)) for title, values in matrices),
        ("share of tokens where both fire", found.route_overlap, 1.0),
        ("subspaces shared", found.sites.subspace, 1.0),
        ("cosine of changes", found.sites.cosine, 1.0),
    ]
    side = 2.4 + 0.35 * len(found.names)
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(side * len(panels), side), layout="constrained"
    )
    for axes, panel in zip(all_axes, panels, strict=True):
        _panel(axes, found.names, *panel)
    all_axes[0].set(xlabel="text of domain", ylabel="expert")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _panel(axes: Axes, names: Sequence[str], title: str, values: Values, limit: float) -> None:
    image = axes.imshow(values, cmap="coolwarm", vmin=-limit, vmax=limit)
    if len(names) <= _MOST_NUMBERED:
        for (i, j), value in np.ndenumerate(values):
            axes.text(j, i, "" if np.isnan(value) else f"{value:.2f}", ha="center", va="center")
    axes.set_title(title, fontsize=9)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.figure.colorbar(image, ax=axes, shrink=0.7)


def _page(found: Interference, conflicts: Sequence[Conflict], threshold: float) -> Iterator[str]:
    yield from ("# Interference between forget experts", "")
    yield f"{'Above' if conflicts else 'Nothing is above'} {threshold:g} nats per answer token."
    yield ""
    yield from (f"- {sentence(conflict)}" for conflict in conflicts)
    yield from ("", f"![Heat map]({PLOT_FILE})", "", "Rows are experts, columns domains.")
    for title, values in _tables(found):
        yield from ("", f"{title}:", "")
        yield from _table("expert", found.names, found.names, values)
    yield from ("", "Mean answer loss of each domain's own rows, nats:", "")
    losses = (found.forgetting.without, found.forgetting.alone, found.forgetting.together)
    columns = ("no expert", "its own alone", "all together")
    yield from _table("domain", columns, found.names, np.stack(losses, axis=1))


def _tables(found: Interference) -> Iterator[tuple[str, Values]]:
    for text, harm in (("rows", found.on_rows), ("retain neighbours", found.on_neighbours)):
        if harm is not None:
            yield f"Change of mean answer loss on {text}, expert alone, nats", harm.loss_change
            yield f"Change of answer probability on {text}", harm.probability_change
            yield f"Share of answer tokens of {text} routed to the expert", harm.routed_share
    yield "Share of tokens where both heads fire", found.route_overlap
    yield "Cosine of B_i A and B_j A, mean over sites", found.sites.cosine
    yield f"Subspaces of B shared (by chance {found.sites.chance:.3f})", found.sites.subspace


def _table(
    corner: str, columns: Sequence[str], names: Sequence[str], values: Values
) -> Iterator[str]:
    yield f"| {corner} | {' | '.join(columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    for name, row in zip(names, values, strict=True):
        yield f"| {name} | {' | '.join(f'{value:.4f}' for value in row)} |"
