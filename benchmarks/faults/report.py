"""Figures of the run, from what its blocks have found."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import write_results

from .settings import FaultSettings

Result = dict[str, Any]
Blocks = Mapping[str, Result]

MIN_FAULTS, MIN_REAL_FAULTS = 10_000, 200
MIN_SWITCHES = 10_000
MAX_RECOVERY_BEYOND_START_S = 2.0
MAX_GROWTH = 1.02
MAX_BARRIER_MS = 100.0


def write_report(out: Path, settings: FaultSettings, blocks: Blocks) -> Path:
    """Writes `faults.json` and `faults.md` from the blocks that were measured."""
    figures, not_measured = figures_of(blocks)
    judged = judge(figures)
    return write_results(
        out,
        "faults",
        title="Faults injected into fleets",
        figures=figures,
        seed=settings.seed,
        not_measured=not_measured,
        notes={
            "bars": judged,
            "bars_missed": [name for name, holds in judged.items() if holds is False],
            "settings": repr(settings),
            **_notes(blocks),
        },
        table=_table(figures, judged, not_measured, blocks),
    )


def figures_of(blocks: Blocks) -> tuple[dict[str, float | None], dict[str, str]]:
    """The figures, and why some are missing."""
    runs = [*blocks.get("fleets", {}).get("episodes", ())]
    real = blocks.get("real")
    everything = [*runs, real] if real is not None else runs
    recovery = [seconds for run in runs for seconds in run["recovery_s"]]
    churned = blocks.get("churn")

    def total(counted: Callable[[Result], int]) -> int | None:
        return sum(map(counted, everything)) if everything else None

    figures: dict[str, float | None] = {
        "faults_injected": total(lambda run: sum(run["faults"].values())),
        "faults_real_engine": None if real is None else sum(real["faults"].values()),
        "tokens_checked": total(lambda run: run["tokens_checked"]),
        "tokens_without_active_domain": total(lambda run: run["tokens_without_active_domain"]),
        "acknowledged_changes": total(lambda run: run["acknowledged_changes"]),
        "acknowledged_changes_lost": total(lambda run: run["acknowledged_changes_lost"]),
        "start_s_median": _quantile([s for run in runs for s in run["start_s"]], 0.5),
        "recovery_s_p99": _quantile(recovery, 0.99),
        "recovery_real_engine_s_p99": None if real is None else _quantile(real["recovery_s"], 0.99),
        # The last one starts beside the others, which are asked all the time, as one that was killed does.
        "start_real_engine_s": None if real is None else round(real["start_s"][-1], 1),
        "defects": total(lambda run: len(run["defects"])),
        "switches_churned": None if churned is None else churned["switches"],
        "memory_growth_ratio": None
        if churned is None
        else round(churned["memory_growth_ratio"], 4),
        "barrier_p99_ms": _quantile(blocks.get("barrier", {}).get("ms", ()), 0.99),
        "schemathesis_requests": blocks.get("schema", {}).get("requests"),
        "schemathesis_failures": blocks.get("schema", {}).get("failures"),
    }
    why = "the block that measures it has not been run"
    return figures, {name: why for name, value in figures.items() if value is None}


def judge(figures: Mapping[str, float | None]) -> dict[str, bool | None]:
    """Which bars hold; None: not known."""

    def bar(holds: Any, *names: str) -> bool | None:
        values = [figures[name] for name in names]
        return None if None in values else bool(holds(*values))

    return {
        f"{MIN_FAULTS} faults": bar(lambda n: n >= MIN_FAULTS, "faults_injected"),
        f"{MIN_REAL_FAULTS} of them against vLLM": bar(
            lambda n: n >= MIN_REAL_FAULTS, "faults_real_engine"
        ),
        "no token without an active domain": bar(
            lambda wrong, all_: wrong == 0 and all_ > 0,
            "tokens_without_active_domain",
            "tokens_checked",
        ),
        "no acknowledged change lost": bar(
            lambda lost, all_: lost == 0 and all_ > 0,
            "acknowledged_changes_lost",
            "acknowledged_changes",
        ),
        "every fleet recovered": bar(lambda n: n == 0, "defects"),
        "recovery within the start and 2 s": bar(
            lambda p99, start: p99 <= start + MAX_RECOVERY_BEYOND_START_S,
            "recovery_s_p99",
            "start_s_median",
        ),
        "the same against vLLM": bar(
            lambda p99, start: p99 <= start + MAX_RECOVERY_BEYOND_START_S,
            "recovery_real_engine_s_p99",
            "start_real_engine_s",
        ),
        f"{MIN_SWITCHES} switches": bar(lambda n: n >= MIN_SWITCHES, "switches_churned"),
        "memory flat within 2 %": bar(lambda ratio: ratio <= MAX_GROWTH, "memory_growth_ratio"),
        "barrier within 100 ms": bar(lambda ms: ms <= MAX_BARRIER_MS, "barrier_p99_ms"),
        "no failure of schemathesis": bar(
            lambda failed, sent: failed == 0 and sent > 0,
            "schemathesis_failures",
            "schemathesis_requests",
        ),
    }


def _quantile(values: Sequence[float], share: float) -> float | None:
    if not values:
        return None
    return round(sorted(values)[max(0, math.ceil(share * len(values)) - 1)], 3)


def _notes(blocks: Blocks) -> dict[str, Any]:
    runs = list(blocks.get("fleets", {}).get("episodes", ()))
    found: dict[str, Any] = {"faults": dict(_by_kind(runs).most_common())}
    if (real := blocks.get("real")) is not None:
        found["faults_real_engine"] = dict(Counter(real["faults"]).most_common())
        found["answers_across_a_switch"] = real["answers_across_a_switch"]
    defects = [d for run in [*runs, *([real] if real else [])] for d in run["defects"]]
    violations = [v for run in [*runs, *([real] if real else [])] for v in run["violations"]]
    violations += blocks.get("schema", {}).get("found", [])
    if defects or violations:
        found["found"] = (defects + violations)[:50]
    return found


def _by_kind(runs: Iterable[Result]) -> Counter[str]:
    total: Counter[str] = Counter()
    for run in runs:
        total.update(run["faults"])
    return total


def _table(
    figures: Mapping[str, float | None],
    judged: Mapping[str, bool | None],
    not_measured: Mapping[str, str],
    blocks: Blocks,
) -> str:
    lines = ["| figure | value |", "|---|---|"]
    for name, value in figures.items():
        shown = f"not measured: {not_measured[name]}" if value is None else f"{value:,g}"
        lines.append(f"| `{name}` | {shown} |")
    words = {True: "yes", False: "**no**", None: "not measured"}
    lines += ["", "| bar | holds |", "|---|---|"]
    lines += [f"| {name} | {words[holds]} |" for name, holds in judged.items()]
    real = blocks.get("real", {}).get("faults", {})
    double = _by_kind(blocks.get("fleets", {}).get("episodes", ()))
    lines += ["", "| fault | with the engine's double | with vLLM |", "|---|---|---|"]
    for kind in sorted(double | Counter(real)):
        lines.append(f"| {kind} | {double[kind]:,} | {real.get(kind, 0):,} |")
    return "\n".join(lines)
