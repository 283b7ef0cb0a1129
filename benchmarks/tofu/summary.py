"""All figures of unlearning TOFU on one page, drawn from the pages of its tables.

python -m benchmarks.tofu.summary        docs/results/tofu.{json,md}
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from benchmarks.results import write_results

from .splits import SPLITS

Results = dict[str, Any]
"""Content of a results file."""
TABLES = {
    "tofu-router": "python -m benchmarks.tofu.router --seeds 3",
    "tofu-sequential": "python -m benchmarks.tofu.sequential",
    "tofu-composition": "python -m benchmarks.tofu.sequential",
    "tofu-timing": "python -m benchmarks.tofu.timing",
    "tofu-attacks": "python -m benchmarks.tofu.attacks",
    "tofu-entropy": "python -m benchmarks.tofu.entropy",
    "tofu-entropy-gate": "python -m benchmarks.tofu.entropy_gate",
    "tofu-noise": "python -m benchmarks.tofu.noise",
    "tofu-subset": "python -m benchmarks.tofu",
    **{
        f"tofu-{split}": f"python -m benchmarks.tofu --split {split} --variants default --seeds 3"
        for split in SPLITS
    },
}
"""The command that measures each."""


def _of(key: str) -> Callable[[Results], float]:
    """A figure as the table has it."""
    return lambda found: found[key]


def _split_figures(split: str) -> dict[str, tuple[str, str, Callable[[Results], float]]]:
    """Of one split: (table, bar, how the figure follows from the table's)."""
    table = f"tofu-{split}"

    def over(key: str, row: str) -> Callable[[Results], float]:
        return lambda found: found[f"default/{key}"] / found[f"{row}/{key}"]

    def leak(found: Results) -> float:
        key = "forget_paraphrased_Q_A_ROUGE"
        return 100 * (found[f"default/{key}"] - found[f"retrained/{key}"])

    return {
        f"forget{split}_quality_p": (table, ">= 0.05", _of("default/forget_quality")),
        f"forget{split}_loss_ks_p": (table, "aim >= 0.05", _of("default/forget_loss_ks_p")),
        f"forget{split}_model_utility_ratio": (table, ">= 0.99", over("model_utility", "base")),
        f"forget{split}_extraction_strength": (
            table,
            "as retrained",
            _of("default/extraction_strength"),
        ),
        f"forget{split}_extraction_strength_retrained": (
            table,
            "",
            _of("retrained/extraction_strength"),
        ),
        f"forget{split}_privleak": (table, "as retrained (0)", _of("default/privleak_perturbed")),
        f"forget{split}_paraphrase_leak_points": (table, "<= 2", leak),
        f"forget{split}_repetition_ratio": (
            table,
            "<= 1.5",
            over("repetition_rate", "retrained"),
        ),
    }


def _highest(part: str, key: str) -> Callable[[Results], float]:
    """The highest of a column over the rows whose name holds `part`."""
    return lambda found: max(
        value
        for name, value in found.items()
        if value is not None and part in name and name.endswith(f"/{key}")
    )


def _highest_leak(found: Results) -> float:
    """Over prompts; the other attacks, on weights, have a figure of what they recover."""
    rows = {name.rpartition("/")[0] for name in found}
    return max(found[f"{row}/leak"] for row in rows if f"{row}/unlearned, recovered" not in found)


FIGURES: dict[str, tuple[str, str, Callable[[Results], float]]] = {
    **{key: value for split in SPLITS for key, value in _split_figures(split).items()},
    "first_token_miss_paraphrased": ("tofu-router", "<= 0.01", _of("default/missed/paraphrased")),
    "first_token_miss_nameless": ("tofu-router", "<= 0.03", _of("default/missed/name-less")),
    "false_alarm_retain": (
        "tofu-router",
        "<= 0.002",
        lambda found: max(
            found["default/routed/retain"], found["default/routed/retain, paraphrased"]
        ),
    ),
    "false_alarm_long": (
        "tofu-router",
        "<= 0.002",
        _of("default/routed/WikiText, windows of 4,096 tokens"),
    ),
    "sequential_utility_loss": (
        "tofu-sequential",
        "<= 0.01",
        lambda found: (
            1 - min(value for name, value in found.items() if name.endswith("utility_ratio"))
        ),
    ),
    "composition_loss_points": ("tofu-composition", "<= 1", _highest("", "loss_points")),
    "train_time_over_ga": ("tofu-timing", "<= 0.10", _of("ALTER/over_gradient_ascent")),
    "train_time_over_asymlora": ("tofu-timing", "<= 1.10", _of("ALTER/over_asymlora")),
    "relearn_recovery_points": (
        "tofu-attacks",
        "beside the retrained model's",
        _highest("relearning", "unlearned, recovered"),
    ),
    "int4_recovery_points": (
        "tofu-attacks",
        "beside the retrained model's",
        _of("4-bit weights/unlearned, recovered"),
    ),
    "prefix_leak_points": ("tofu-attacks", "beside the retrained model's", _highest_leak),
}
"""By name: table, bar, and how the figure follows from the table's."""

_NOISE = {
    f"forget{split}_{key}": f"forget{split}: {kept}/{key}_sd"
    for split, kept in SPLITS.items()
    for key in ("extraction_strength", "privleak")
}
"""By figure: what `tofu-noise` calls its standard deviation for the retrained model."""


def _moment(text: str) -> datetime:
    """A time of the local zone, unless it names one."""
    try:
        return datetime.fromisoformat(text).astimezone()
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"expected a time such as 2026-11-21T21:41:00+00:00, got {text!r}"
        ) from error


def main() -> None:
    """Collects the tables that are there and writes `tofu`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument(
        "--since",
        type=_moment,
        help="when the training of experts last changed (ISO 8601); tables of before are marked",
    )
    options = parser.parse_args()
    found = {
        table: json.loads(path.read_text("utf-8"))
        for table in TABLES
        if (path := options.out / f"{table}.json").exists()
    }
    earlier = [
        table
        for table, content in found.items()
        if options.since
        and table != "tofu-noise"
        and datetime.fromisoformat(content["measured_at"]) < options.since
    ]
    figures: dict[str, float | None] = {}
    missing: dict[str, str] = {}
    for name, (table, _, follows) in FIGURES.items():
        figures[name] = follows(found[table]["figures"]) if table in found else None
        if figures[name] is None:
            missing[name] = f"`{TABLES[table]}` was not run"
    lines = ["| figure | value | bar | table |", "|---|---|---|---|"]
    for name, (table, bar, _) in FIGURES.items():
        value = figures[name]
        if name in _NOISE and "tofu-noise" in found:
            bar += f" ± {2 * found['tofu-noise']['figures'][_NOISE[name]]:.2g}"
        shown = "not measured" if value is None else f"{value:.3g}"
        if table in earlier:
            shown += " (earlier method)"
        lines.append(f"| `{name}` | {shown} | {bar} | [{table}]({table}.md) |")
    lines += ["", "| table | command |", "|---|---|"]
    lines += [f"| [{table}]({table}.md) | `{TABLES[table]}` |" for table in found]
    path = write_results(
        options.out,
        "tofu",
        title="TOFU: unlearning against the retrained model",
        figures=figures,
        not_measured=missing,
        seed=0,
        notes={
            "of an earlier method": earlier,
            "±": "two standard deviations of the retrained model's figure, over rows drawn anew",
            "measured": {table: content["measured_at"] for table, content in found.items()},
            "models": "base and retrained of one recipe, 5 million parameters, trained from scratch",
        },
        table="\n".join(lines),
    )
    print(path)


if __name__ == "__main__":
    main()
