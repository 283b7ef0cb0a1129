"""One measured variant: experts trained for a split, and every figure of what they leave behind."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import trainer
from alter_cli.demo import authors as invented
from alter_cli.demo.corpus import QA, write_jsonl
from alter_cli.demo.tofu import general_text
from alter_core import ForgetExpert, Substrate
from alter_core.attach import AttachedModel
from alter_eval import tofu
from alter_eval.models import LanguageModel, TransformersModel, WithoutExperts
from trainer.base_model import BaseModel, load_base_model
from trainer.dataset import EncodedRow, Row, encode_rows
from trainer.substrate import on_device

from .reference import CACHE, Recipe, reference_model
from .splits import Split

Figures = dict[str, float | None]


class Bench:
    """A split with its base and retrained model, trained unless the cache has them."""

    def __init__(self, split: Split, data: Path, recipe: Recipe, cache: Path = CACHE) -> None:
        self.split, self.cache = split, cache
        self.base_folder = reference_model(split.known, data, recipe, cache=cache)
        self.retrained_folder = reference_model(split.retain, data, recipe, cache=cache)
        folder = cache / f"rows-{split.name}"
        folder.mkdir(parents=True, exist_ok=True)
        neighbours = invented.generate(num_domains=1, seed=2)
        self.files = {
            name: write_jsonl(folder / f"{name}.jsonl", rows)
            for name, rows in split.domains.items()
        }
        self.retain = write_jsonl(folder / "retain.jsonl", [*split.retain, *split.facts])
        self.general = (
            write_jsonl(folder / "general.jsonl", general_text(data)),
            write_jsonl(
                folder / "invented.jsonl", [r for rows in neighbours.parts().values() for r in rows]
            ),
        )
        self.base_logs = self.logs("base", lambda: load_base_model(self.base_folder))
        self.retrained_logs = self.logs("retrained", lambda: load_base_model(self.retrained_folder))

    def logs(self, name: str, load: Callable[[], BaseModel]) -> tofu.ModelLogs:
        """What a model without experts makes of the split's rows, kept in the cache."""
        folder = self.base_folder if name == "base" else self.retrained_folder
        path = folder / f"logs-{self.split.name}.json"
        if not path.exists():
            base = load()
            found = self._measure(TransformersModel(base), None)
            path.write_text(json.dumps(_plain(found)))
        content = json.loads(path.read_text())
        return tofu.ModelLogs(
            sets={n: tofu.SetLog.model_validate(v) for n, v in content["sets"].items()},
            holdout=tofu.HoldoutLog.model_validate(content["holdout"]),
        )

    def run(self, changes: Mapping[str, Any], seed: int) -> Figures:
        """Trains experts with some settings changed, measures them, and returns all figures."""
        key = hashlib.sha256(json.dumps([sorted(changes.items()), seed]).encode()).hexdigest()
        out = self.cache / f"experts-{self.split.name}-{key[:12]}"
        shutil.rmtree(out, ignore_errors=True)
        started = time.monotonic()
        result = trainer.train(self._settings(out, changes, seed))
        seconds = time.monotonic() - started
        base = load_base_model(self.base_folder)
        substrate = on_device(Substrate.read(result.substrate, base.info), base.device)
        experts = [ForgetExpert.read(folder, substrate) for folder in result.experts.values()]
        attached = AttachedModel(base.model, substrate, experts)
        try:
            logs = self._measure(TransformersModel(base), WithoutExperts(base, attached))
        finally:
            attached.detach()
        return tofu.figures(logs, self.retrained_logs) | {"train_seconds": seconds}

    def _settings(self, out: Path, changes: Mapping[str, Any], seed: int) -> trainer.TrainSettings:
        parts = {
            "alter": {},
            "expert_settings": {},
            "substrate_settings": {},
            "evidence_settings": {},
        }
        for name, value in changes.items():
            part, _, field = name.partition(".")
            parts[part][field] = value
        return trainer.TrainSettings(
            model=self.base_folder,
            out=out,
            forget=self.files,
            retain=(self.retain,),
            general=self.general,
            alter=parts["alter"],
            expert_settings=trainer.ExpertSettings(**parts["expert_settings"]),
            substrate_settings=trainer.SubstrateSettings(**parts["substrate_settings"]),
            evidence_settings=trainer.EvidenceSettings(**parts["evidence_settings"]),
            evaluation_rows=0,
            seed=seed,
        )

    def _measure(self, model: LanguageModel, judge: LanguageModel | None) -> tofu.ModelLogs:
        common = _text_words([*self.split.retain, *self.split.facts])
        return tofu.ModelLogs(
            sets={
                name: tofu.evaluate_set(model, rows, judge if name == "forget" else None, common)
                for name, rows in self.split.measured.items()
            },
            holdout=tofu.evaluate_holdout(model, _encoded(model, self.split.holdout)),
        )


def _text_words(rows: list[QA]) -> set[str]:
    return tofu.words_of(
        tofu.TofuRow(question=row.question, answer=row.answer, perturbed_answers=()) for row in rows
    )


def _encoded(model: LanguageModel, rows: list[QA]) -> list[EncodedRow]:
    turns = [
        Row(file=Path("holdout"), line=n, turns=(("user", r.question), ("assistant", r.answer)))
        for n, r in enumerate(rows, start=1)
    ]
    return encode_rows(turns, model.tokenizer, max_tokens=1024)


def _plain(logs: tofu.ModelLogs) -> dict[str, Any]:
    assert logs.holdout is not None
    return {
        "sets": {name: log.model_dump() for name, log in logs.sets.items()},
        "holdout": logs.holdout.model_dump(),
    }
