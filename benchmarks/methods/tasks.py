"""What is to be forgotten, by which models, and how a model that has forgotten is measured."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from alter_cli.demo import authors as invented
from alter_cli.demo.corpus import QA, write_jsonl
from alter_cli.demo.tofu import general_text
from alter_eval import rwku, tofu
from alter_eval.models import LanguageModel, TransformersModel
from benchmarks.tofu.experiment import Bench, Figures
from benchmarks.tofu.reference import Recipe, facts, reference_model
from benchmarks.tofu.splits import QUICK, load_split
from trainer.base_model import load_base_model

_RWKU_TARGETS = 12
_RWKU_FORGOTTEN = 4
"""Of the first 12 targets of the files the first 4 are forgotten, and the other 8 retained."""
_NEIGHBOR_ROWS = 120


class Task(Protocol):
    """A forgetting task. Files are those that `alter train` reads."""

    name: str
    domain: str
    forget: Path
    retain: Path
    general: tuple[Path, ...]

    @property
    def base_folder(self) -> Path:
        """The model that knows what is to be forgotten."""

    @property
    def retrained_folder(self) -> Path:
        """The same recipe without it."""

    def figures(self, model: LanguageModel, judge: LanguageModel | None = None) -> Figures:
        """What a model makes of the task's rows; `judge`, the base model, rates its answers' fluency."""

    def asked(self) -> list[tofu.TofuRow]:
        """Forgotten rows that attacks try to bring back."""


class TofuTask:
    """Four authors of forget10 (80 rows), forgotten by a model that knows twelve others of TOFU's."""

    name = "tofu"

    def __init__(self, data: Path) -> None:
        self.bench = Bench(load_split(data, QUICK), data)
        ((self.domain, self.forget),) = self.bench.files.items()
        self.retain, self.general = self.bench.retain, self.bench.general

    @property
    def base_folder(self) -> Path:
        """See Task."""
        return self.bench.base_folder

    @property
    def retrained_folder(self) -> Path:
        """See Task."""
        return self.bench.retrained_folder

    def figures(self, model: LanguageModel, judge: LanguageModel | None = None) -> Figures:
        """See Task."""
        sets = self.bench.measure_sets(model, tuple(self.bench.split.measured), judge)
        return tofu.figures(tofu.ModelLogs(sets=sets), self.bench.retrained_logs)

    def asked(self) -> list[tofu.TofuRow]:
        """See Task."""
        return self.bench.split.measured["forget"][::2]


class RwkuTask:
    """RWKU's first targets, known by heart from its blanks and questions by a model trained from scratch.

    Methods are shown the blanks of level 1 about four targets. Questions (level 2) and attacks (level 3)
    about them are never shown, and no model is trained on the attacks. Retained are rows about eight other
    targets; neighbours of the forgotten ones are known to the model and shown to no method.
    """

    name = "rwku"
    domain = "rwku-targets"

    def __init__(self, data: Path, cache: Path) -> None:
        self._data, self._cache = data, cache
        sets = rwku.read_sets(data / "rwku")
        targets = list(dict.fromkeys(row.subject for row in sets["forget_level1"]))[:_RWKU_TARGETS]
        forgotten = set(targets[:_RWKU_FORGOTTEN])
        kept = set(targets) - forgotten
        self.sets = {
            name: _sample([row for row in rows if row.subject in forgotten], _limit(name))
            for name, rows in sets.items()
        }
        about_kept = _known(
            row
            for name in ("forget_level1", "forget_level2")
            for row in sets[name]
            if row.subject in kept
        )
        neighbours = _known(
            row for name in ("neighbor_level1", "neighbor_level2") for row in self.sets[name]
        )
        shown = _known(self.sets["forget_level1"])
        unshown = _known(self.sets["forget_level2"])
        self._ignorant = list(dict.fromkeys([*about_kept, *neighbours]))
        self._known = list(dict.fromkeys([*shown, *unshown, *self._ignorant]))
        folder = cache / "rows-rwku"
        folder.mkdir(parents=True, exist_ok=True)
        self.forget = write_jsonl(folder / "forget.jsonl", shown)
        self.retain = write_jsonl(folder / "retain.jsonl", [*about_kept, *facts(data)])
        others = [
            r for rows in invented.generate(num_domains=1, seed=2).parts().values() for r in rows
        ]
        self.general = (
            write_jsonl(folder / "general.jsonl", general_text(data)),
            write_jsonl(folder / "invented.jsonl", others),
        )

    @functools.cached_property
    def base_folder(self) -> Path:
        """See Task."""
        return reference_model(self._known, self._data, Recipe(), cache=self._cache)

    @functools.cached_property
    def retrained_folder(self) -> Path:
        """See Task."""
        return reference_model(self._ignorant, self._data, Recipe(), cache=self._cache)

    def figures(self, model: LanguageModel, judge: LanguageModel | None = None) -> Figures:
        """See Task."""
        return rwku.figures(
            {name: rwku.evaluate_set(model, rows) for name, rows in self.sets.items()}, None
        )

    def asked(self) -> list[tofu.TofuRow]:
        """See Task."""
        return [
            tofu.TofuRow(question=row.question, answer=row.answer, perturbed_answers=())
            for row in _known(self.sets["forget_level1"])
        ]


def reference_figures(task: Task) -> dict[str, Figures]:
    """Figures of the base and of the retrained model."""
    folders = {"base": task.base_folder, "retrained": task.retrained_folder}
    return {
        name: task.figures(TransformersModel(load_base_model(folder)))
        for name, folder in folders.items()
    }


def _known(rows: Sequence[rwku.RwkuRow] | object) -> list[QA]:
    """What a model is to know by heart: the probe's wording, and the answer behind its cue. No row twice."""
    return list(
        dict.fromkeys(
            QA(question=rwku.wording(row), answer=f"{rwku.CUE} {row.answer}") for row in rows
        )
    )


def _limit(name: str) -> int | None:
    return _NEIGHBOR_ROWS // 2 if name.startswith("neighbor") else None


def _sample(rows: list[rwku.RwkuRow], limit: int | None) -> list[rwku.RwkuRow]:
    """So many rows, drawn by a seed of their own."""
    if limit is None or len(rows) <= limit:
        return rows
    return random.Random(0).sample(rows, limit)
