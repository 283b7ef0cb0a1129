"""What the gate by entropy is worth, where there is something for it to decide.

    python -m benchmarks.tofu.entropy_gate       docs/results/tofu-entropy-gate.{json,md}

Rows known by heart have no uncertain token (`tofu-entropy`), so the mask leaves none out. Half-learned rows
have some, and so have forget files with prose in which the rows' answers stand. In either situation, experts
are trained with the entropy mask and without it, and served with both paths of Eq. 9 and with one.
16 authors, 4 of them forgotten.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from alter_cli.demo.memorization import Schedule
from alter_cli.demo.tofu import wikitext_paragraphs
from alter_core.config import AlterConfig
from alter_core.sites import default_tap_layer
from alter_eval import tofu
from alter_eval.data import default_data_dir
from trainer.base_model import BaseModel, load_base_model
from trainer.dataset import EncodedRow
from trainer.evaluation import answer_losses

from .entropy import entropies
from .experiment import Bench, Figures, attached, encoded_files
from .options import parsed, table_parser
from .reference import Recipe
from .splits import QUICK, load_split
from .table import write_table

VARIANTS: dict[str, dict[str, Any]] = {
    "mask and both paths": {},
    "lowest 80 % and both paths": {"expert_settings.entropy_mask": "quantile"},
    "no mask, both paths": {"expert_settings.entropy_mask": "none"},
    "no mask, one path": {
        "expert_settings.entropy_mask": "none",
        "alter.entropy_threshold": 1.99,
    },
}
_SHOWN = (
    "forget_quality",
    "forget_loss_ks_p",
    "forget_nll",
    "forget_Q_A_ROUGE",
    "extraction_strength",
    "repetition_rate",
    "model_utility",
)
_OF_VARIANTS = (
    "prose behind a question: loss added",
    "prose alone: routed",
    "train_seconds",
)
_HALF_LEARNED = Recipe(schedule=Schedule(stop_loss=1.5))
_ANSWERS_PER_DOCUMENT = 4
_PASSAGE_TOKENS = 48
_NUM_PASSAGES = 40
_SENTENCE = re.compile(r"(?<=[a-z]\.) +(?=[A-Z])")
_MIN_WORDS, _MAX_WORDS = 12, 30


def sentences(data: Path) -> list[str]:
    """Sentences of WikiText that no model here was trained on."""
    text = (data / "text" / "wikitext2_test.txt").read_text("utf-8")
    found = (part for line in wikitext_paragraphs(text) for part in _SENTENCE.split(line))
    return [sentence for sentence in found if _MIN_WORDS <= len(sentence.split()) <= _MAX_WORDS]


def with_prose(path: Path, prose: Iterator[str]) -> Path:
    """A forget file with documents behind its rows: answers, each between sentences about other things."""
    lines = path.read_text("utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    for start in range(0, len(answers), _ANSWERS_PER_DOCUMENT):
        parts = [next(prose)]
        for answer in answers[start : start + _ANSWERS_PER_DOCUMENT]:
            parts += [answer, next(prose)]
        lines.append(json.dumps({"text": " ".join(parts)}))
    out = path.with_name(f"{path.stem}-prose.jsonl")
    out.write_text("\n".join(lines) + "\n", "utf-8")
    return out


def situations(data: Path, prose: Sequence[str]) -> dict[str, Bench]:
    """The split with its models, twice."""
    split = load_split(data, QUICK)
    half = dataclasses.replace(split, name="quick-half-learned", recipe=_HALF_LEARNED)
    documents = Bench(dataclasses.replace(split, name="quick-prose"), data)
    documents.files = {
        name: with_prose(path, iter(prose)) for name, path in documents.files.items()
    }
    return {"half learned": Bench(half, data), "with prose": documents}


class Prose:
    """Passages about other things, behind questions about what is forgotten."""

    def __init__(self, base: BaseModel, bench: Bench, passages: Sequence[str]) -> None:
        asked = encoded_files(base, *bench.files.values())[:_NUM_PASSAGES]
        ids = base.tokenizer(" ".join(passages))["input_ids"]
        self.alone = [
            tuple(ids[at : at + _PASSAGE_TOKENS])
            for at in range(0, _PASSAGE_TOKENS * len(asked), _PASSAGE_TOKENS)
        ]
        self.behind = [
            EncodedRow(
                ids=(*row.ids[: row.num_prompt], *passage),
                is_answer=(False,) * row.num_prompt + (True,) * len(passage),
            )
            for row, passage in zip(asked, self.alone, strict=True)
        ]

    def loss(self, base: BaseModel) -> float:
        """Mean over passages, nats per token, with whatever is attached."""
        return fmean(answer_losses(base, self.behind))


def figures(bench: Bench, passages: Sequence[str], changes: dict[str, Any], seed: int) -> Figures:
    """What is forgotten, and what happens to prose beside it."""
    found = bench.run(changes, seed)
    trained = bench.train(changes, seed)
    base = load_base_model(bench.base_folder)
    prose = Prose(base, bench, passages)
    with attached(base, trained.substrate, trained.experts.values()) as model:
        unlearned = prose.loss(base)
        with model.disabled():
            before = prose.loss(base)
        logits = [model.evidence_logits(torch.tensor([ids])) for ids in prose.alone]
    return {
        **{name: found[name] for name in _SHOWN},
        "prose behind a question: loss added": unlearned - before,
        "prose alone: routed": fmean(float((value > 0).any(-1).float().mean()) for value in logits),
        "train_seconds": trained.seconds,
    }


def references(bench: Bench, passages: Sequence[str]) -> dict[str, Figures]:
    """Base and retrained model."""
    base = load_base_model(bench.base_folder)
    config = AlterConfig(tap_layer=default_tap_layer(base.info.num_layers))
    values = entropies(base, encoded_files(base, *bench.files.values()), config)
    retrained = load_base_model(bench.retrained_folder)
    before = Prose(base, bench, passages).loss(base)
    added = Prose(retrained, bench, passages).loss(retrained) - before
    logs = {"base": bench.base_logs, "retrained": bench.retrained_logs}
    rows = {
        kind: {
            name: value
            for name, value in tofu.figures(found, bench.retrained_logs).items()
            if name in _SHOWN
        }
        for kind, found in logs.items()
    }
    rows["base"]["tokens above the threshold"] = float((values > config.entropy_threshold).mean())
    rows["retrained"]["prose behind a question: loss added"] = added
    return rows


def main() -> None:
    """Measures every variant in every situation and writes `tofu-entropy-gate`."""
    parser = table_parser(__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    options = parsed(parser)
    data = default_data_dir()
    every = sentences(data)
    prose, passages = every[: len(every) // 2], every[len(every) // 2 :]
    rows: dict[str, list[Figures]] = {}
    for situation, bench in situations(data, prose).items():
        for kind, found in references(bench, passages).items():
            rows[f"{situation}: {kind}"] = [found]
        for name, changes in VARIANTS.items():
            key = f"{situation}: {name}"
            rows[key] = [figures(bench, passages, changes, seed) for seed in range(options.seeds)]
            print(key, rows[key][0], flush=True)
    path = write_table(
        options.out,
        "tofu-entropy-gate",
        rows,
        title="TOFU: what the gate by entropy is worth",
        columns=("tokens above the threshold", *_SHOWN, *_OF_VARIANTS),
        notes={
            "rows": "80 forgotten in 1 domain, 240 retained",
            "half learned": f"training ends at {_HALF_LEARNED.schedule.stop_loss} nats per answer "
            "token, of the retrained model too",
            "with prose": f"documents of {_ANSWERS_PER_DOCUMENT} answers between sentences of "
            "WikiText beside the rows",
            "prose": f"{_NUM_PASSAGES} other passages of {_PASSAGE_TOKENS} tokens; over the base "
            "model's loss, nats per token",
            "seeds": options.seeds,
        },
    )
    print(path)


if __name__ == "__main__":
    main()
