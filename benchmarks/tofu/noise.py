"""How far apart two models are that never learned the same rows: what "as the retrained model" can mean.

TOFU's splits are nested, so the model retrained for a larger split never learned a smaller one's rows either.
And each split's own retrained model is held against itself on rows drawn anew, with replacement.

python -m benchmarks.tofu.noise        docs/results/tofu-noise.{json,md}
"""

from __future__ import annotations

import itertools
from statistics import fmean, stdev

import numpy as np

from alter_eval import metrics, tofu
from alter_eval.data import default_data_dir
from alter_eval.models import TransformersModel
from trainer.base_model import load_base_model

from .experiment import Bench, Figures
from .options import parsed, table_parser
from .splits import SPLITS, load_split
from .table import write_table

SHOWN = (
    "forget_quality",
    "forget_loss_ks_p",
    "forget_nll",
    "forget_paraphrased_Q_A_ROUGE",
    "extraction_strength",
    "extraction_strength_sd",
    "privleak_perturbed",
    "privleak_sd",
    "repetition_rate",
)
_DRAWS = 200


def spread_by_rows(log: tofu.SetLog, seed: int) -> Figures:
    """Standard deviations over rows drawn anew: of a model's mean extraction strength, and of its PrivLeak
    against itself, in percent.
    """
    generator = np.random.default_rng(seed)
    whole = tofu.perturbed_auc(log)
    strengths, leaks = [], []
    for _ in range(_DRAWS):
        rows = [log.rows[index] for index in generator.integers(len(log.rows), size=len(log.rows))]
        strengths.append(fmean(row.extraction_strength for row in rows))
        redrawn = tofu.perturbed_auc(log.model_copy(update={"rows": rows}))
        leaks.append(metrics.privleak(redrawn, whole))
    return {"extraction_strength_sd": stdev(strengths), "privleak_sd": stdev(leaks)}


def main() -> None:
    """Measures retrained models against each other and writes `tofu-noise`."""
    options = parsed(table_parser(__doc__))
    data = default_data_dir()
    benches = {split: Bench(load_split(data, split), data) for split in SPLITS}
    rows: dict[str, list[Figures]] = {}
    for split, bench in benches.items():
        logs = bench.retrained_logs
        spread = spread_by_rows(logs.sets["forget"], seed=0)
        rows[f"forget{split}: {SPLITS[split]}"] = [tofu.figures(logs, logs) | spread]
    for (split, bench), (larger, other) in itertools.combinations(benches.items(), 2):
        folder = other.retrained_folder
        found = bench.measure(TransformersModel(load_base_model(folder)), kept=folder)
        name = f"forget{split}: {SPLITS[larger]}"
        rows[name] = [tofu.figures(found, bench.retrained_logs)]
    path = write_table(
        options.out,
        "tofu-noise",
        dict(sorted(rows.items())),
        title="TOFU: models that never learned the same rows, against each other",
        columns=SHOWN,
        notes={
            "rows": "forget set: what the model was trained on; against the split's own retrained model",
            "sd": f"of the split's own retrained model, rows drawn anew {_DRAWS} times",
            "models": "of one recipe and one seed, 5 million parameters, trained from scratch",
        },
    )
    print(path)


if __name__ == "__main__":
    main()
