"""Observation II of the paper on these models: is entropy bimodal, of which tokens, and does it stay?

    python -m benchmarks.tofu.entropy --split 10       docs/results/tofu-entropy.{json,md,png}

A token's entropy is S_q of the distribution that it is drawn from. The range of S_1.5 is cut at thirds:
two modes leave the middle empty. Sarle's bimodality coefficient is above 5/9 where there are two.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import matplotlib.pyplot as plt
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import kurtosis, skew
from transformers import PreTrainedTokenizerBase

from alter_core.config import AlterConfig
from alter_core.entropy import max_tsallis_entropy
from alter_eval.data import default_data_dir
from trainer.base_model import BaseModel, load_base_model
from trainer.batches import sample_rows
from trainer.dataset import EncodedRow
from trainer.entropy_pass import run_entropy_pass

from .experiment import Bench, Figures, attached, encoded_files
from .options import parsed, table_parser
from .probes import LONG_TOKENS, long_windows
from .splits import SPLITS, SUBSET, load_split
from .table import write_table

_SAMPLE_TOKENS = 30_000
_PIECE = 256
"""The longest rows that the models were trained on have some 300 tokens."""
_BINS = 60
_WIKI = "WikiText, never seen"
Values = NDArray[np.float64]


def text_sets(bench: Bench, data: Path, base: BaseModel) -> dict[str, list[EncodedRow]]:
    """Rows by kind, some 30,000 tokens each."""

    def sampled(*files: Path) -> list[EncodedRow]:
        return sample_rows(encoded_files(base, *files), _SAMPLE_TOKENS, seed=0)

    wiki = (data / "text" / "wikitext2_test.txt").read_text("utf-8")
    pieces = [
        ids[at : at + _PIECE]
        for ids in long_windows(base.tokenizer, wiki)
        for at in range(0, LONG_TOKENS, _PIECE)
    ]
    unseen = [EncodedRow(ids=tuple(ids), is_answer=(True,) * len(ids)) for ids in pieces]
    return {
        "forgotten": sampled(*bench.files.values()),
        "retained": sampled(bench.retain),
        "general, trained on": sampled(bench.general[0]),
        _WIKI: sample_rows(unseen, _SAMPLE_TOKENS, seed=0),
    }


def entropies(base: BaseModel, rows: Sequence[EncodedRow], config: AlterConfig) -> Values:
    """S_q of the distribution that each answer token is drawn from, row by row. Shape: (N,)."""
    found = run_entropy_pass(
        base, rows, tsallis_q=config.tsallis_q, tap_layer=config.tap_layer
    ).entropy
    return np.concatenate(
        [v[:-1][torch.tensor(row.is_answer[1:])] for v, row in zip(found, rows, strict=True)]
    ).astype(np.float64)


def distribution(values: Values, config: AlterConfig) -> Figures:
    """Shape of a distribution of entropies."""
    third = max_tsallis_entropy(config.tsallis_q) / 3
    size, lean = len(values), skew(values)
    tails = kurtosis(values) + 3 * (size - 1) ** 2 / ((size - 2) * (size - 3))
    coefficient = float((lean**2 + 1) / tails)
    return {
        "above the threshold": float(np.mean(values > config.entropy_threshold)),
        "lowest third": float(np.mean(values < third)),
        "middle third": float(np.mean((values >= third) & (values < 2 * third))),
        "highest third": float(np.mean(values >= 2 * third)),
        "bimodality coefficient": coefficient if math.isfinite(coefficient) else None,
    }


def by_kind(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[EncodedRow], values: Values
) -> dict[str, Values]:
    """Entropies by the kind of token that was drawn."""
    tokens = tokenizer.convert_ids_to_tokens(
        [t for row in rows for t, a in zip(row.ids[1:], row.is_answer[1:], strict=True) if a]
    )
    kinds = np.array([_kind(token) for token in tokens])
    return {kind: values[kinds == kind] for kind in sorted(set(kinds.tolist()))}


def _kind(token: str) -> str:
    body = token.lstrip("Ġ▁")
    if not body or not any(c.isalnum() for c in body):
        return "punctuation and end"
    if any(c.isdigit() for c in body):
        return "digits"
    if body == token:
        return "inside a word"
    return "first of a capitalised word" if body[0].isupper() else "first of another word"


def same_side(one: Values, other: Values, threshold: float) -> float:
    """Share of tokens that stay on their side of the threshold."""
    return float(np.mean((one > threshold) == (other > threshold)))


def plot(path: Path, found: Mapping[str, Values], threshold: float) -> None:
    """Histograms of the base model's entropies."""
    figure, axes = plt.subplots(1, len(found), figsize=(3.2 * len(found), 2.8), sharex=True)
    for axis, (name, values) in zip(axes, found.items(), strict=True):
        axis.hist(values, bins=_BINS, density=True, color="#4477aa")
        axis.axvline(threshold, color="#cc6677", linestyle="--")
        axis.set_title(name)
        axis.set_xlabel("Tsallis entropy")
        axis.set_yscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Measures entropies before and after unlearning and writes `tofu-entropy`."""
    parser = table_parser(__doc__, (SUBSET, *SPLITS), "10")
    parser.add_argument("--seed", type=int, default=0)
    options = parsed(parser)
    data = default_data_dir()
    bench = Bench(load_split(data, options.split), data)
    trained = bench.train({}, options.seed)
    base = load_base_model(bench.base_folder)
    retrained = load_base_model(bench.retrained_folder)
    sets = text_sets(bench, data, base)
    with attached(base, trained.substrate, trained.experts.values()) as model:
        config = model.substrate.config
        after = {name: entropies(base, rows, config) for name, rows in sets.items()}
        with model.disabled():
            before = {name: entropies(base, rows, config) for name, rows in sets.items()}
    without = {name: entropies(retrained, rows, config) for name, rows in sets.items()}
    limit = config.entropy_threshold
    rows: dict[str, list[Figures]] = {}
    for name in sets:
        stays = {
            "same side after unlearning": same_side(before[name], after[name], limit),
            "same side in the retrained model": same_side(before[name], without[name], limit),
        }
        rows[f"{name}, base"] = [distribution(before[name], config) | stays]
        rows[f"{name}, unlearned"] = [distribution(after[name], config)]
        rows[f"{name}, retrained"] = [distribution(without[name], config)]
    for name, members in sets.items():
        for kind, values in by_kind(base.tokenizer, members, before[name]).items():
            rows[f"{name}, base: {kind}"] = [distribution(values, config)]
    options.out.mkdir(parents=True, exist_ok=True)
    plot(options.out / "tofu-entropy.png", before, limit)
    path = write_table(
        options.out,
        "tofu-entropy",
        rows,
        title="TOFU: entropy of tokens, before and after unlearning",
        notes={
            "entropy": f"Tsallis, q {config.tsallis_q}, threshold {limit}; answer tokens",
            "tokens": {name: len(values) for name, values in before.items()},
            "plot": "[base model](tofu-entropy.png)",
        },
        seed=options.seed,
    )
    print(path)


if __name__ == "__main__":
    main()
