"""How late evidence is, and how often it is wrong: heads on questions asked in other ways.

    python -m benchmarks.tofu.router --split 10          docs/results/tofu-router.{json,md}

Heads are trained without experts, a minute each. Missed is a question whose first answer token is predicted
without the expert; a false alarm is a token of other text that is routed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from alter_core.config import AlterConfig
from alter_core.errors import TrainingError
from alter_core.sites import default_tap_layer
from alter_eval import tofu
from alter_eval.data import default_data_dir
from trainer.base_model import load_base_model
from trainer.dataset import EncodedRow
from trainer.evaluation import routed_logits
from trainer.router import EvidenceSettings, train_evidence
from trainer.substrate import initial_substrate, normalised_embeddings

from .experiment import Bench, Figures, encoded_files
from .options import parsed, table_parser
from .probes import authors_of, conversations, long_windows, prompts, questions
from .splits import SPLITS, SUBSET, load_split
from .table import write_table

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "unigrams": {"evidence_ngram": 1},
    "bigrams": {"evidence_ngram": 2},
    "trigrams": {"evidence_ngram": 3},
    "six-grams": {"evidence_ngram": 6},
    "window 32": {"evidence_window": 32},
    "window 128": {"evidence_window": 128},
    "window 256": {"evidence_window": 256},
    "no name dropout": {"bag_dropout": 0.0},
    "no hard negatives": {"hard_negatives": False},
    "dates as written": {"rewritten_dates": False},
}
MID_DEPTH = "mid-depth state"
DEFAULT = "default"
COMBINED = "default or mid-depth state"
_NEGATIVE_TOKENS = 40_000
_FALSE_ALARMS = 0.002
"""What the mid-depth classifier is calibrated to, on its own negatives."""


Detector = Callable[[Sequence[Sequence[int]]], list[NDArray[np.bool_]]]
"""Which tokens of each text, given as token ids, are routed."""


class Probes:
    """A split's domain, negatives and probes, as token ids."""

    def __init__(self, bench: Bench, data: Path) -> None:
        self.base = load_base_model(bench.base_folder)
        self.tap_layer = default_tap_layer(self.base.info.num_layers)
        tokenizer, split = self.base.tokenizer, bench.split
        self.domain = encoded_files(self.base, next(iter(bench.files.values())))
        self.retain = [row.ids for row in encoded_files(self.base, bench.retain)]
        self.general = [row.ids for row in encoded_files(self.base, *bench.general)]
        authors = authors_of(split.measured["forget"][: len(self.domain)], split.retain)
        wiki = (data / "text" / "wikitext2_test.txt").read_text("utf-8")
        self.asked = {
            kind: prompts(tokenizer, texts) for kind, texts in questions(authors, wiki).items()
        }
        self.chats = list(conversations(authors, split.retain, tokenizer))
        reworded = [
            row.paraphrased_question or row.question
            for row in tofu.read_rows(data / "tofu" / "retain_perturbed.json")
        ]
        self.others: dict[str, Sequence[Sequence[int]]] = {
            "retain": self.retain,
            "retain, paraphrased": prompts(tokenizer, reworded),
            "WikiText, windows of 4,096 tokens": long_windows(tokenizer, wiki),
        }

    def head(self, changes: Mapping[str, Any], seed: int) -> Detector:
        """The domain's evidence head, trained with some settings changed."""
        of_config = AlterConfig.__dataclass_fields__.keys()
        alter = {name: value for name, value in changes.items() if name in of_config}
        evidence = {name: value for name, value in changes.items() if name not in of_config}
        config = AlterConfig(tap_layer=self.tap_layer, **alter)
        embeddings = normalised_embeddings(self.base, initial_substrate(self.base, config, seed))
        head, _ = train_evidence(
            embeddings,
            self.domain,
            [*self.retain, *self.general],
            self.base.tokenizer,
            config,
            EvidenceSettings(**evidence),
            seed=seed,
        )

        def detect(texts: Sequence[Sequence[int]]) -> list[NDArray[np.bool_]]:
            found = routed_logits(head, embeddings, config, texts)
            return [(logits > 0).numpy() for logits in found]

        return detect

    def mid_depth(self, seed: int) -> Detector:
        """A linear classifier on the residual stream at the tap layer, token by token, without a window."""
        drawn = np.random.default_rng(seed)
        asked = self._states([row.ids[: row.num_prompt] for row in self.domain])
        positive = np.stack([states[-1] for states in asked])
        negative = np.concatenate(self._states([*self.retain, *self.general]))
        negative = negative[drawn.choice(len(negative), _NEGATIVE_TOKENS, replace=False)]
        classifier = LogisticRegression(max_iter=500, class_weight="balanced")
        labels = np.repeat([1, 0], [len(positive), len(negative)])
        classifier.fit(np.concatenate([positive, negative]), labels)
        limit = np.quantile(classifier.decision_function(negative), 1 - _FALSE_ALARMS)

        def detect(texts: Sequence[Sequence[int]]) -> list[NDArray[np.bool_]]:
            return [classifier.decision_function(s) > limit for s in self._states(texts)]

        return detect

    @torch.inference_mode()
    def _states(self, texts: Sequence[Sequence[int]]) -> list[NDArray[np.float32]]:
        """Hidden states at the tap layer's input, in pieces that the model takes. Shapes: per text (T, D)."""
        found = []
        for ids in texts:
            pieces = torch.tensor(ids).split(self.base.max_tokens)
            states = [
                self.base.model.base_model(piece[None], output_hidden_states=True)
                .hidden_states[self.tap_layer][0]
                .float()
                for piece in pieces
            ]
            found.append(torch.cat(states).numpy())
        return found

    def figures(self, detect: Detector) -> Figures:
        """Shares of questions missed and of other tokens routed, by kind."""
        missed = {
            f"missed/{kind}": 1 - _share(flags[-1] for flags in detect(asked))
            for kind, asked in self.asked.items()
        }
        routed = {
            f"routed/{kind}": _share(flag for flags in detect(texts) for flag in flags)
            for kind, texts in self.others.items()
        }
        flags = detect([row.ids for row in self.domain])
        answers = (
            flag
            for row, found in zip(self.domain, flags, strict=True)
            for flag in found[row.num_prompt - 1 : -1]
        )
        missed["missed/all answer tokens, as trained on"] = 1 - _share(answers)
        return {**missed, **routed, **self._chat_figures(detect)}

    def _chat_figures(self, detect: Detector) -> Figures:
        """Of the long chats: the author's turns missed; others' answer tokens routed, before and after."""
        found: list[bool] = []
        before: list[bool] = []
        after: list[bool] = []
        for (row, is_asked), flags in zip(
            self.chats, detect([row.ids for row, _ in self.chats]), strict=True
        ):
            has_begun = False
            for (start, stop), is_about in zip(_answers(row), is_asked, strict=True):
                if is_about:
                    has_begun = True
                    found.append(flags[start - 1])
                else:
                    (after if has_begun else before).extend(flags[start - 1 : stop - 1])
        return {
            "missed/in a long chat": 1 - _share(found),
            "routed/in a long chat, before the topic": _share(before),
            "routed/in a long chat, after the topic": _share(after),
        }


def _answers(row: EncodedRow) -> list[tuple[int, int]]:
    """(start, stop) of every answer of a chat."""
    edges = np.flatnonzero(np.diff([0, *row.is_answer, 0]))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _share(flags: Iterable[Any]) -> float:
    values = list(flags)
    return float(np.mean(values)) if values else 0.0


def main() -> None:
    """Measures every variant and writes `tofu-router`."""
    parser = table_parser(__doc__, (SUBSET, *SPLITS), "10")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seeds", type=int, default=1, help="of the default; variants have one")
    options = parsed(parser)
    data = default_data_dir()
    probes = Probes(Bench(load_split(data, options.split), data), data)
    rows: dict[str, list[Figures]] = {}
    detectors: dict[str, Detector] = {}
    refused: dict[str, str] = {}
    for name in options.variants.split(","):
        seeds = range(options.seeds if name == DEFAULT else 1)
        try:
            found = [probes.head(VARIANTS[name], seed) for seed in seeds]
        except TrainingError as error:
            refused[name] = error.what
            continue
        detectors[name] = found[0]
        rows[name] = [probes.figures(detect) for detect in found]
        print(name, rows[name][0], flush=True)
    states = probes.mid_depth(seed=0)
    rows[MID_DEPTH] = [probes.figures(states)]
    if DEFAULT in detectors:
        rows[COMBINED] = [probes.figures(_either(detectors[DEFAULT], states))]
    print(
        write_table(
            options.out,
            "tofu-router",
            rows,
            title="TOFU: evidence at the first answer token, and false alarms",
            notes={
                "split": options.split,
                "questions": {kind: len(asked) for kind, asked in probes.asked.items()},
                "refused": refused,
                "seeds": f"{options.seeds} of {DEFAULT}, 1 of every variant",
            },
        )
    )


def _either(one: Detector, other: Detector) -> Detector:
    def detect(texts: Sequence[Sequence[int]]) -> list[NDArray[np.bool_]]:
        return [a | b for a, b in zip(one(texts), other(texts), strict=True)]

    return detect


if __name__ == "__main__":
    main()
