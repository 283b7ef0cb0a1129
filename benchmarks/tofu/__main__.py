"""Variants of the method on TOFU, against a model retrained without the rows: `make bench-tofu`.

    python -m benchmarks.tofu --split subset            every variant, docs/results/tofu-subset.{json,md}
    python -m benchmarks.tofu --split 10 --variants default --seeds 3

Each variant trains its experts anew. Base and retrained models come from the cache in `build/tofu`, or are
trained first: 5 to 6 minutes each for the subset on 2 cores, much longer for 01, 05 and 10 (all 4,000 rows).
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from alter_eval import tofu
from alter_eval.data import default_data_dir
from benchmarks.results import write_results

from .experiment import Bench, Figures
from .reference import Recipe
from .splits import SPLITS, SUBSET, load_split

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "ihl": {"expert_settings.forget_loss": "ihl"},
    "capped": {"expert_settings.forget_loss": "capped"},
    "no_level": {"expert_settings.level_weight": 0.0},
    "no_answers": {"expert_settings.answer_weight": 0.0},
    "kept_1pct": {"expert_settings.kept_share": 0.01},
    "rank_8": {"alter.rank": 8},
    "rank_16": {"alter.rank": 16},
    "no_entropy_mask": {"expert_settings.entropy_mask": "none"},
}
"""Settings that differ from the defaults, by variant."""
SHOWN = (
    "forget_quality",
    "forget_loss_ks_p",
    "forget_nll",
    "forget_Q_A_ROUGE",
    "forget_Truth_Ratio",
    "forget_paraphrased_Q_A_ROUGE",
    "forget_word_leak",
    "extraction_strength",
    "exact_memorization",
    "privleak",
    "min_k_auc_perturbed",
    "repetition_rate",
    "model_utility",
    "train_seconds",
)
QUICK = ("default", "ihl")


def main() -> None:
    """Measures the variants and writes `tofu-SPLIT.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=(SUBSET, *SPLITS), default=SUBSET)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--quick", action="store_true", help="two variants, written to build/")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = QUICK if options.quick else options.variants.split(",")
    data = default_data_dir()
    bench = Bench(load_split(data, options.split), data, Recipe())
    rows: dict[str, list[Figures]] = {
        "base": [tofu.figures(bench.base_logs, bench.retrained_logs)],
        "retrained": [tofu.figures(bench.retrained_logs, bench.retrained_logs)],
    }
    for name in names:
        rows[name] = [bench.run(VARIANTS[name], seed) for seed in range(options.seeds)]
        print(name, {key: rows[name][0][key] for key in SHOWN}, flush=True)
    path = write_results(
        Path("build") if options.quick else options.out,
        f"tofu-{options.split}",
        title=f"TOFU, {options.split}: variants of the method",
        figures={f"{n}/{k}": _mean(found, k) for n, found in rows.items() for k in SHOWN},
        spread={
            f"{n}/{k}": (min(_known(found, k)), max(_known(found, k)))
            for n, found in rows.items()
            for k in SHOWN
            if len(_known(found, k)) > 1
        },
        not_measured={
            f"{n}/train_seconds": "no experts are trained" for n in ("base", "retrained")
        },
        seed=0,
        notes={
            "rows": f"{len(bench.split.measured['forget'])} forgotten in {len(bench.split.domains)} "
            f"domains, {len(bench.split.retain)} retained",
            "seeds": options.seeds,
            "models": "base and retrained of one recipe, 5 million parameters, trained from scratch",
        },
        table=_table(rows),
    )
    print(path)


def _known(found: list[Figures], key: str) -> list[float]:
    return [value for figures in found if (value := figures.get(key)) is not None]


def _mean(found: list[Figures], key: str) -> float | None:
    values = _known(found, key)
    return fmean(values) if values else None


def _table(rows: dict[str, list[Figures]]) -> str:
    """One line a variant, means over seeds."""
    lines = [f"| variant | {' | '.join(SHOWN)} |", "|---" * (1 + len(SHOWN)) + "|"]
    for name, found in rows.items():
        cells = [_mean(found, key) for key in SHOWN]
        shown = ["" if value is None else f"{value:.3g}" for value in cells]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
