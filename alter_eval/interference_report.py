"""The page of a measurement of interference, its figures and its heat map. Needs matplotlib.

out/interference.json   figures by name, and the conflicts above the threshold
out/interference.md     the same as tables
out/interference.png    the heat map
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from trainer.checkpoint import write_atomically

from .interference import Conflict, Interference
from .metrics import Values

JSON_FILE = "interference.json"
PAGE_FILE = "interference.md"
PLOT_FILE = "interference.png"
_MOST_NUMBERED = 8
"""Domains beyond which the heat map has colours alone."""

Matrix = tuple[str, Values, bool]
"""Title, values [expert, domain], and whether the diagonal is something else than the rest."""


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


def _matrices(found: Interference) -> Iterator[Matrix]:
    yield "loss on rows, change in nats", found.on_rows.loss_change, True
    if found.on_neighbours is not None:
        yield "loss on neighbours, change in nats", found.on_neighbours.loss_change, False
    yield "routes shared, share of tokens", found.route_overlap, True
    yield "subspaces shared", found.sites.subspace, True
    yield "cosine of changes", found.sites.cosine, True


def _heat_map(path: Path, found: Interference) -> None:
    matrices, size = list(_matrices(found)), len(found.names)
    side = 2.4 + 0.35 * size
    figure, all_axes = plt.subplots(
        1, len(matrices), figsize=(side * len(matrices), side), layout="constrained"
    )
    for axes, (title, values, has_other_diagonal) in zip(all_axes, matrices, strict=True):
        is_shown = (
            ~np.eye(size, dtype=np.bool_) if has_other_diagonal else np.full((size, size), True)
        )
        limit = max(float(np.abs(values[is_shown]).max()), 1e-9)
        image = axes.imshow(
            np.where(is_shown, values, np.nan), cmap="RdBu_r", vmin=-limit, vmax=limit
        )
        if size <= _MOST_NUMBERED:
            for (i, j), value in np.ndenumerate(values):
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8)
        axes.set_title(title, fontsize=9)
        axes.set_xticks(range(size), found.names, rotation=45, ha="right")
        axes.set_yticks(range(size), found.names)
        figure.colorbar(image, ax=axes, shrink=0.7)
    all_axes[0].set(xlabel="text of domain", ylabel="expert")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _page(found: Interference, conflicts: list[Conflict], threshold: float) -> Iterator[str]:
    yield "# Interference between forget experts"
    yield ""
    yield (
        f"Above {threshold:g} nats per answer token:"
        if conflicts
        else (f"No conflict above {threshold:g} nats per answer token.")
    )
    yield ""
    yield from (f"- {sentence(conflict)}" for conflict in conflicts)
    yield f"\n![Heat map]({PLOT_FILE})"
    parts = [("rows", found.on_rows), ("retain neighbours", found.on_neighbours)]
    for text, harm in parts:
        if harm is not None:
            of = f"of a domain's {text}, under another's expert alone"
            yield from _table(f"Change of mean answer loss {of}, nats", found, harm.loss_change)
            yield from _table(f"Change of answer probability {of}", found, harm.probability_change)
            yield from _table(
                f"Share of answer tokens {of}, routed to it", found, harm.routed_share
            )
    yield from ("", "Forgetting: mean answer loss of a domain's own rows, nats:", "")
    yield from ("| domain | no expert | its own alone | all together |", "|---|---|---|---|")
    losses = (found.forgetting.without, found.forgetting.alone, found.forgetting.together)
    for name, *values in zip(found.names, *losses, strict=True):
        yield f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |"
    yield from _table("Share of tokens at which both heads fire", found, found.route_overlap)
    yield from _table("Cosine of B_i A and B_j A, mean over sites", found, found.sites.cosine)
    chance = (
        f"Subspaces of B_i and B_j shared, mean over sites (by chance {found.sites.chance:.3f})"
    )
    yield from _table(chance, found, found.sites.subspace)


def _table(title: str, found: Interference, values: Values) -> Iterator[str]:
    yield from ("", f"{title}:", "")
    yield "| expert | " + " | ".join(found.names) + " |"
    yield "|---" * (1 + len(found.names)) + "|"
    for name, row in zip(found.names, values, strict=True):
        yield f"| {name} | " + " | ".join(f"{value:.4f}" for value in row) + " |"
