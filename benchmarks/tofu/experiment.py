"""A TOFU split with its base and retrained model: experts trained for it, and what they leave behind."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import trainer
from alter_cli.demo import authors as invented
from alter_cli.demo.artefacts import package_folder, sources
from alter_cli.demo.corpus import QA, write_jsonl
from alter_cli.demo.tofu import general_text
from alter_core import ForgetExpert, Substrate
from alter_core.attach import AttachedModel
from alter_core.rows import read_rows
from alter_eval import tofu
from alter_eval.logs import read_log
from alter_eval.models import LanguageModel, TransformersModel, WithoutExperts
from trainer.base_model import BaseModel, load_base_model
from trainer.checkpoint import write_atomically
from trainer.dataset import EncodedRow, encode_rows
from trainer.evaluation import attached_experts
from trainer.substrate import on_device

from .reference import CACHE, reference_model
from .splits import Split

Figures = dict[str, float | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """Bundles of a training run."""

    folder: Path
    substrate: Path
    experts: dict[str, Path]
    timings_s: dict[str, float]
    """As in the run's `run.json`."""

    @property
    def seconds(self) -> float:
        """Training alone, without its evaluation."""
        return sum(
            seconds
            for part, seconds in self.timings_s.items()
            if "/" in part or part == "substrate"
        )


class Bench:
    """A split with its base and retrained model, trained unless the cache has them."""

    def __init__(self, split: Split, data: Path, cache: Path = CACHE) -> None:
        self.split, self.data, self.cache = split, data, cache
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
        self.common_words = tofu.words_of(tofu_rows([*split.retain, *split.facts]))

    @functools.cached_property
    def base_folder(self) -> Path:
        """The model that knows what is to be forgotten."""
        return self._reference(self.split.known)

    @functools.cached_property
    def retrained_folder(self) -> Path:
        """The model that never learned it."""
        return self._reference(self.split.retain)

    @functools.cached_property
    def base_logs(self) -> tofu.ModelLogs:
        """What the base model makes of the split's rows."""
        folder = self.base_folder
        return self.measure(TransformersModel(load_base_model(folder)), kept=folder)

    @functools.cached_property
    def retrained_logs(self) -> tofu.ModelLogs:
        """What the retrained model makes of them."""
        folder = self.retrained_folder
        return self.measure(TransformersModel(load_base_model(folder)), kept=folder)

    def run(self, changes: Mapping[str, Any], seed: int) -> Figures:
        """Trains experts with some settings changed, measures them, and returns all figures."""
        trained = self.train(changes, seed)
        base = load_base_model(self.base_folder)
        with attached(base, trained.substrate, trained.experts.values()) as model:
            judge = WithoutExperts(base, model)
            logs = self.measure(TransformersModel(base), judge, kept=trained.folder)
        return tofu.figures(logs, self.retrained_logs) | {"train_seconds": trained.seconds}

    def train(
        self,
        changes: Mapping[str, Any],
        seed: int,
        *,
        domains: Sequence[str] | None = None,
        substrate: Path | None = None,
    ) -> Trained:
        """Experts of some of the split's domains, or of all. The cache has those that this code trained."""
        names = list(self.files if domains is None else domains)
        code = [sources(package_folder(name)) for name in ("trainer", "alter_core")]
        key = [self.base_folder.name, sorted(changes.items()), seed, names, str(substrate), code]
        out = self.cache / f"experts-{self.split.name}-{_digest(key)}"
        run_file = out / "run.json"
        if not run_file.exists():
            shutil.rmtree(out, ignore_errors=True)
            trainer.train(self._settings(out, names, substrate, changes, seed))
        timings = json.loads(run_file.read_bytes())["timings_s"]
        return Trained(
            folder=out,
            substrate=substrate or out / "substrate",
            experts={name: out / name for name in names},
            timings_s=timings,
        )

    def _settings(
        self,
        out: Path,
        domains: Sequence[str],
        substrate: Path | None,
        changes: Mapping[str, Any],
        seed: int,
    ) -> trainer.TrainSettings:
        parts: dict[str, dict[str, Any]] = {
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
            forget={name: self.files[name] for name in domains},
            retain=(self.retain,),
            general=self.general,
            substrate=substrate,
            alter=parts["alter"],
            expert_settings=trainer.ExpertSettings(**parts["expert_settings"]),
            substrate_settings=trainer.SubstrateSettings(**parts["substrate_settings"]),
            evidence_settings=trainer.EvidenceSettings(**parts["evidence_settings"]),
            evaluation_rows=0,
            seed=seed,
        )

    def measure(
        self, model: LanguageModel, judge: LanguageModel | None = None, kept: Path | None = None
    ) -> tofu.ModelLogs:
        """What a model makes of the split's rows. Logs stay in `kept` and are found there again."""
        encoded = tofu.encode(model.tokenizer, tofu_rows(self.split.holdout))
        return tofu.ModelLogs(
            sets=self.measure_sets(model, tuple(self.split.measured), judge, kept),
            holdout=tofu.evaluate_holdout(model, encoded) if encoded else None,
        )

    def measure_sets(
        self,
        model: LanguageModel,
        names: Sequence[str],
        judge: LanguageModel | None = None,
        kept: Path | None = None,
    ) -> dict[str, tofu.SetLog]:
        """The same of some sets."""
        sets = {}
        for name in names:
            rows = self.split.measured[name]
            is_forgotten = name == "forget"
            common = self.common_words if is_forgotten else set()
            key = [tofu.dataset_digest(rows), *([sorted(common)] if common else [])]
            path = kept and kept / f"log-{name}-{_digest(key)}.json"
            if path and path.exists():
                sets[name] = read_log(path, tofu.SetLog)
                continue
            sets[name] = tofu.evaluate_set(model, rows, judge if is_forgotten else None, common)
            if path:
                write_atomically(path, sets[name].model_dump_json().encode() + b"\n")
        return sets

    def _reference(self, known: list[QA]) -> Path:
        return reference_model(known, self.data, self.split.recipe, cache=self.cache)


@contextlib.contextmanager
def attached(base: BaseModel, substrate: Path, experts: Iterable[Path]) -> Iterator[AttachedModel]:
    """The base model with the experts of these bundles, inside the block."""
    shared = on_device(Substrate.read(substrate, base.info), base.device)
    read = [ForgetExpert.read(path, shared) for path in experts]
    with attached_experts(base, shared, read) as model:
        yield model


def encoded_files(base: BaseModel, *files: Path) -> list[EncodedRow]:
    """The rows of training files as token ids, as `alter train` reads them."""
    return encode_rows(read_rows(files), base.tokenizer, max_tokens=base.max_tokens)


def tofu_rows(rows: Sequence[QA]) -> list[tofu.TofuRow]:
    """Questions and answers alone, as the evaluation reads them."""
    return [
        tofu.TofuRow(question=row.question, answer=row.answer, perturbed_answers=()) for row in rows
    ]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
