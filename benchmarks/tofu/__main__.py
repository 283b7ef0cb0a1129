"""Variants of the method on TOFU, against a model retrained without the rows: `make bench-tofu`.

    python -m benchmarks.tofu --split subset            every variant, docs/results/tofu-subset.{json,md}
    python -m benchmarks.tofu --split 10 --variants default --seeds 3

Experts come from the cache in `build/tofu` if the trainer's code has not changed; base and retrained models
too, or they are trained first: 5 to 6 minutes each for the subset on 2 cores, about 25 for 01, 05 and 10.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")


from alter_core.errors import TrainingError
from alter_eval import tofu
from alter_eval.data import default_data_dir

from .experiment import Bench, Figures
from .options import parsed, table_parser
from .splits import QUICK, SPLITS, SUBSET, load_split
from .table import plot_trade_off, write_table

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "ihl": {"expert_settings.forget_loss": "ihl"},
    "capped": {"expert_settings.forget_loss": "capped"},
    "temperature_1": {"expert_settings.temperature": 1.0},
    "no_level": {"expert_settings.level_weight": 0.0},
    "no_answers": {"expert_settings.answer_weight": 0.0},
    "no_others": {"expert_settings.others_weight": 0.0},
    "kept_1pct": {"expert_settings.kept_share": 0.01},
    "rank_8": {"alter.rank": 8},
    "rank_16": {"alter.rank": 16},
    "no_entropy_mask": {"expert_settings.entropy_mask": "none"},
    "mask_quantile": {"expert_settings.entropy_mask": "quantile"},
    "mask_atwu": {"expert_settings.entropy_mask": "atwu"},
    "threshold_0.3": {"alter.entropy_threshold": 0.3},
    "threshold_1.9": {"alter.entropy_threshold": 1.9},
    "q_1.2": {"alter.tsallis_q": 1.2, "alter.entropy_threshold": 2.47},
    "q_2": {"alter.tsallis_q": 2.0, "alter.entropy_threshold": 0.61},
    "two_pass": {"alter.entropy_source": "two_pass"},
    "tap_0": {"alter.tap_layer": 0},
    "tap_2": {"alter.tap_layer": 2},
    "tap_3": {"alter.tap_layer": 3},
    "attention_only": {"alter.target_modules": ["qkv", "o"]},
    "mlp_only": {"alter.target_modules": ["gate_up", "down"]},
    "trained_retain": {"alter.retain_expert": "trained"},
    "a_high_entropy": {"substrate_settings.a_gradient": "high_entropy"},
    "a_undetached": {"substrate_settings.a_gradient": "undetached"},
    "structural_term": {
        "substrate_settings.a_gradient": "high_entropy",
        "substrate_settings.structure_weight": 0.01,
    },
    "scalar_router": {"alter.router": "scalar"},
}
"""Settings that differ from the defaults, by variant. Thresholds of other q lie as far up their range."""
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
    "privleak_perturbed",
    "repetition_rate",
    "model_utility",
    "train_seconds",
)
QUICK_VARIANTS = ("default", "ihl")


def main() -> None:
    """Measures the variants and writes `tofu-SPLIT.json`."""
    parser = table_parser(__doc__, (SUBSET, *SPLITS), SUBSET)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="16 authors, two variants, written to build/"
    )
    options = parsed(parser)
    names = QUICK_VARIANTS if options.quick else options.variants.split(",")
    split = QUICK if options.quick else options.split
    data = default_data_dir()
    bench = Bench(load_split(data, split), data)
    rows: dict[str, list[Figures]] = {
        "base": [tofu.figures(bench.base_logs, bench.retrained_logs)],
        "retrained": [tofu.figures(bench.retrained_logs, bench.retrained_logs)],
    }
    refused: dict[str, str] = {}
    for name in names:
        try:
            rows[name] = [bench.run(VARIANTS[name], seed) for seed in range(options.seeds)]
        except TrainingError as error:
            refused[name] = error.what
            continue
        print(name, {key: rows[name][0][key] for key in SHOWN}, flush=True)
    out = Path("build") if options.quick else options.out
    out.mkdir(parents=True, exist_ok=True)
    plot_trade_off(out / f"tofu-{split}.png", rows)
    path = write_table(
        out,
        f"tofu-{split}",
        rows,
        title=f"TOFU, {split}: variants of the method",
        columns=SHOWN,
        notes={
            "rows": f"{len(bench.split.measured['forget'])} forgotten in {len(bench.split.domains)} "
            f"domains, {len(bench.split.retain)} retained",
            "seeds": options.seeds,
            "refused": refused,
            "plot": f"[trade-off](tofu-{split}.png)",
            "models": "base and retrained of one recipe, 5 million parameters, trained from scratch",
        },
    )
    print(path)


if __name__ == "__main__":
    main()
