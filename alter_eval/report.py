"""The page of an evaluation, with its plots. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .tofu import ModelLogs, SetLog
from .traces import Trace

_BINS = 30


def write_report(
    out: Path,
    title: str,
    figures: Mapping[str, Any],
    logs: ModelLogs,
    retrained: ModelLogs | None,
    traces: Mapping[str, Trace],
) -> Path:
    """Writes `report.md` and its plots; `traces` by set, empty where there is no gate to look into."""
    plots = {"losses.png": "Answer losses of the forget rows"}
    reference = None if retrained is None else retrained.sets["forget"]
    _losses(out / "losses.png", logs.sets["forget"], reference)
    if traces:
        plots["entropy.png"] = "Tsallis entropy of the base model at answer tokens"
        plots["routing.png"] = "Expert of every token; one line is one row, white marks its answer"
        _entropy(out / "entropy.png", traces)
        _routing(out / "routing.png", traces)
    return write_page(
        out,
        title,
        figures,
        dict.fromkeys(figures, "not told: needs --retrained, --holdout, or answers"),
        plots,
    )


def write_page(
    out: Path,
    title: str,
    figures: Mapping[str, float | None],
    not_measured: Mapping[str, str],
    plots: Mapping[str, str],
    notes: str = "",
) -> Path:
    """Writes `report.md`: the table, where `not_measured` tells why a figure is None, notes and plots."""
    lines = [f"# {title}", "", "| figure | value |", "|---|---|"]
    for name, value in figures.items():
        shown = not_measured.get(name, "not told") if value is None else f"{value:.4g}"
        lines.append(f"| `{name}` | {shown} |")
    if notes:
        lines += ["", notes]
    lines += [line for file, text in plots.items() for line in ("", f"{text}:", "", f"![]({file})")]
    path = out / "report.md"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def _losses(path: Path, forget: SetLog, retrained: SetLog | None) -> None:
    figure, axes = plt.subplots(figsize=(6, 3))
    for label, log in (("evaluated", forget), ("retrained", retrained)):
        if log is not None:
            axes.hist([row.nll for row in log.rows], bins=_BINS, alpha=0.5, label=label)
    axes.set(xlabel="mean loss of an answer, nats per token", ylabel="rows")
    axes.legend()
    _save(figure, path)


def _entropy(path: Path, traces: Mapping[str, Trace]) -> None:
    figure, axes = plt.subplots(figsize=(6, 3))
    for name, trace in traces.items():
        values = np.concatenate([e[a] for e, a in zip(trace.entropy, trace.is_answer, strict=True)])
        axes.hist(values, bins=_BINS, density=True, histtype="step", label=name)
    axes.axvline(next(iter(traces.values())).threshold, color="grey", linestyle=":")
    axes.set(xlabel="S_q", ylabel="density")
    axes.legend()
    _save(figure, path)


def _routing(path: Path, traces: Mapping[str, Trace]) -> None:
    figure, all_axes = plt.subplots(len(traces), 1, figsize=(8, 2 * len(traces)), squeeze=False)
    # One colour is one expert in every panel.
    last = max(1, *(int(experts.max()) for trace in traces.values() for experts in trace.expert))
    for axes, (name, trace) in zip(all_axes[:, 0], traces.items(), strict=True):
        width = max(map(len, trace.expert))
        image = np.full((len(trace.expert), width), np.nan)
        for place, experts in enumerate(trace.expert):
            image[place, : len(experts)] = experts
            start = int(np.argmax(trace.is_answer[place]))
            axes.plot([start - 0.5] * 2, [place - 0.5, place + 0.5], color="white")
        axes.imshow(image, aspect="auto", interpolation="nearest", vmin=0, vmax=last)
        axes.set(ylabel=name, yticks=[])
    all_axes[-1, 0].set_xlabel("token")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
