"""Requests one after another, and experts that were trained apart side by side.

    python -m benchmarks.tofu.sequential       docs/results/tofu-sequential.*, tofu-composition.*

TOFU's forget10 in ten requests of two authors each. The substrate is trained with the first and frozen; every
later expert is trained alone on it, as a server takes it while the earlier ones are active.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

os.environ.setdefault("OMP_WAIT_POLICY", "passive")


from alter_eval import metrics, tofu
from alter_eval.data import default_data_dir
from alter_eval.models import TransformersModel
from trainer.base_model import load_base_model

from .experiment import Bench, Figures, attached
from .options import parsed, table_parser
from .splits import load_requests
from .table import write_table

NUM_COMPOSED = 8


class Requests:
    """Experts of all requests, and what they do together."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench = bench
        self.experts: dict[str, Path] = {}
        self.substrate: Path | None = None
        for name in bench.files:
            trained = bench.train({}, seed, domains=[name], substrate=self.substrate)
            self.substrate = trained.substrate
            self.experts |= trained.experts
            print(name, trained.timings_s, flush=True)
        self.base = load_base_model(bench.base_folder)
        self.rows = {}
        start = 0
        for name, members in bench.split.domains.items():
            self.rows[name] = range(start, start + len(members))
            start += len(members)

    def logs(self, active: Sequence[str], asked: Sequence[str]) -> dict[str, tofu.SetLog]:
        """What the model with some experts makes of some requests' rows."""
        assert self.substrate is not None
        forget = self.bench.split.measured["forget"]
        with attached(self.base, self.substrate, [self.experts[name] for name in active]):
            return {
                name: tofu.evaluate_set(
                    TransformersModel(self.base),
                    [forget[row] for row in self.rows[name]],
                    common_words=self.bench.common_words,
                )
                for name in asked
            }

    def utility(self, active: Sequence[str]) -> float:
        """model_utility with some experts active."""
        assert self.substrate is not None
        with attached(self.base, self.substrate, [self.experts[name] for name in active]):
            sets = self.bench.measure_sets(TransformersModel(self.base), tofu.UTILITY_SETS)
        return tofu.model_utility(sets)


def sequence(requests: Requests) -> dict[str, list[Figures]]:
    """After each request: every forgotten row, and utility over the base model's."""
    names = list(requests.experts)
    retrained = requests.bench.retrained_logs.sets["forget"].rows
    before = requests.utility([])
    rows = {}
    for number in range(1, len(names) + 1):
        active = names[:number]
        logs = requests.logs(active, active)
        found = [row for log in logs.values() for row in log.rows]
        others = [retrained[row] for name in active for row in requests.rows[name]]
        ratios = [
            metrics.truth_ratio([r.correct_nll for r in part], [r.wrong_nll for r in part])
            for part in (found, others)
        ]
        rows[str(number)] = [
            {
                "forget_quality": metrics.ks_p_value(*ratios),
                "forget_loss_ks_p": metrics.ks_p_value(
                    [r.nll for r in found], [r.nll for r in others]
                ),
                "forget_nll": fmean(row.nll for row in found),
                "forget_Q_A_ROUGE": fmean(row.rouge_l for row in found),
                "highest forget_Q_A_ROUGE of a request": max(map(_rouge, logs.values())),
                "model_utility_ratio": requests.utility(active) / before,
            }
        ]
        print(number, rows[str(number)][0], flush=True)
    return rows


def composition(requests: Requests) -> dict[str, list[Figures]]:
    """Every one of eight experts alone and among the others, on its own rows."""
    names = list(requests.experts)[:NUM_COMPOSED]
    together = requests.logs(names, names)
    rows = {}
    for name in names:
        (alone,) = requests.logs([name], [name]).values()
        rows[name] = [
            {
                "alone/forget_Q_A_ROUGE": _rouge(alone),
                "composed/forget_Q_A_ROUGE": _rouge(together[name]),
                "alone/forget_nll": fmean(row.nll for row in alone.rows),
                "composed/forget_nll": fmean(row.nll for row in together[name].rows),
                "loss_points": 100 * (_rouge(together[name]) - _rouge(alone)),
            }
        ]
    return rows


def _rouge(log: tofu.SetLog) -> float:
    return fmean(row.rouge_l for row in log.rows)


def main() -> None:
    """Trains the experts and writes both tables."""
    parser = table_parser(__doc__)
    parser.add_argument("--requests", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parsed(parser)
    data = default_data_dir()
    bench = Bench(load_requests(data, options.requests), data)
    requests = Requests(bench, options.seed)
    notes = {"rows": "2 authors, 40 rows a request; utility on every fourth retained row"}
    for name, title, rows in (
        ("tofu-sequential", "TOFU: ten requests one after another", sequence(requests)),
        (
            "tofu-composition",
            "TOFU: experts trained apart, alone and composed",
            composition(requests),
        ),
    ):
        print(write_table(options.out, name, rows, title=title, notes=notes, seed=options.seed))


if __name__ == "__main__":
    main()
