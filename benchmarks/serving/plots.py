"""Plots of the results page. PNG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .blocks import Result
from .settings import BenchSettings
from .spread import ratios
from .traffic import TrafficKind

mpl.use("Agg")

_DPI = 110


def plot_all(
    folder: Path, name: str, results: Mapping[str, Result], settings: BenchSettings
) -> list[str]:
    """Draws what the results hold of the headline model; returns the files' names."""
    model = settings.headline_model
    drawn = []
    for plot, draw, blocks in (
        ("throughput", _draw_throughput, [f"offline-{model}", f"scale-{model}"]),
        ("latency", _draw_latency, [f"online_{kind}-{model}" for kind in TrafficKind]),
        (
            "switch",
            _draw_switch,
            [f"{kind}-{model}" for kind in ("switch", "switch_retain", "activation")],
        ),
    ):
        found = [(block, results[block]) for block in blocks if block in results]
        if not found:
            continue
        figure, axes = plt.subplots(
            1, len(found), figsize=(5.6 * len(found), 4.2), squeeze=False, layout="constrained"
        )
        for axis, (block, result) in zip(axes[0], found, strict=True):
            draw(axis, result)
            axis.set_title(block)
        drawn.append(f"{name}-{plot}.png")
        figure.savefig(folder / drawn[-1], dpi=_DPI)
        plt.close(figure)
    return drawn


def _draw_throughput(axis: Axes, result: Result) -> None:
    """Ratio to base by case, a mark an engine, lowest to highest as a line."""
    base = result["rates"]["base"]
    cases = list(base)
    engines = [engine for engine in result["rates"] if engine != "base"]
    for place, engine in enumerate(engines):
        found = {c: ratios(rates, base[c]) for c, rates in result["rates"][engine].items()}
        at = [cases.index(case) + 0.2 * (place - (len(engines) - 1) / 2) for case in found]
        values = [ratio.median for ratio in found.values()]
        below = [ratio.median - ratio.low for ratio in found.values()]
        above = [ratio.high - ratio.median for ratio in found.values()]
        axis.errorbar(at, values, yerr=[below, above], fmt="o", markersize=4, label=engine)
    axis.axhline(1.0, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(cases)), cases, rotation=60, ha="right", fontsize=7)
    axis.set_ylabel("tokens a second over base vLLM")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)


def _draw_latency(axis: Axes, result: Result) -> None:
    """Share of requests by time to first token, all replays that count."""
    for server, replays in result["rounds"].items():
        times = sorted(time * 1000 for found in replays for time in found["ttft_s"])
        shares = [(place + 1) / len(times) for place in range(len(times))]
        axis.step(times, shares, where="post", label=server)
    axis.set_xscale("log")
    axis.set_xlabel("time to first token, ms")
    axis.set_ylabel("share of requests")
    axis.legend(fontsize=8)


def _draw_switch(axis: Axes, result: Result) -> None:
    """Gap beyond a plain step against the tokens that the switch recomputes."""
    gaps = [gap * 1000 for gap in result["gap_beyond_step_s"]]
    axis.scatter(result["recomputed_tokens"], gaps, s=16, label="longest gap of a stream")
    pauses = [pause * 1000 for pause in result["pause_s"]]
    axis.scatter(result["recomputed_tokens"], pauses, s=16, label="pause of the engine")
    axis.set_xlabel("tokens computed again")
    axis.set_ylabel("ms")
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=8)
