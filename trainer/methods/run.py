"""One run of an unlearning method: from a model folder and rows to a model folder.

    out/            a transformers model folder, adapters merged, in the base model's dtype
    out/method.json what made it: settings, digests, seed, seconds, versions; never text

Nothing is written before training has ended well.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alter_core.errors import ConfigError, TrainingError
from alter_core.rows import Row, check_disjoint, data_digest, read_rows
from trainer.base_model import BaseModel, load_base_model, without_progress_bar
from trainer.batches import Batch, at_step
from trainer.checkpoint import finite
from trainer.dataset import EncodedRow, encode_rows
from trainer.progress import Reporter, SilentReporter
from trainer.provenance import hardware, versions

from .base import ForgetLoss, Retaining, Task
from .fields import described
from .fit import fit
from .registry import name_of
from .settings import UnlearnSettings

METHOD_FILE = "method.json"


def unlearn(settings: UnlearnSettings, progress: Reporter | None = None) -> Path:
    """Runs a method and returns the folder of the model that has unlearned.

    Raises: ConfigError, TrainingDataError, UnsupportedModelError; TrainingError if a loss is not finite,
    and then nothing is written.
    """
    return _Run(settings, progress or SilentReporter()).execute()


class _Run:
    def __init__(self, settings: UnlearnSettings, reporter: Reporter) -> None:
        self.settings, self.method, self.reporter = settings, settings.method, reporter
        if settings.out.exists():
            raise ConfigError(
                "There is output already", expected="no folder of that name", got=str(settings.out)
            )
        parts = {"forget": read_rows(settings.forget)}
        if settings.retain:
            parts["retain"] = read_rows(settings.retain)
        check_disjoint(parts)
        self.digests = {name: data_digest(rows) for name, rows in parts.items()}
        self.base = self._load()
        self.task = self._task(parts)

    def execute(self) -> Path:
        settings, model = self.settings, self.base.model
        torch.manual_seed(settings.seed)
        started = time.monotonic()
        forget_loss = self.method.forget_loss(self.task)
        adapted = settings.adapter.attach(model) if settings.adapter else None
        groups = self._groups()
        num_trained = sum(value.numel() for group in groups for value in group["params"])
        figures = self._fit(groups, forget_loss)
        train_s = time.monotonic() - started
        merged = (adapted.merge_and_unload() if adapted else model).to(self.base.dtype)
        if not finite([*merged.parameters()]):
            raise TrainingError(
                "Weights are not finite after the last step",
                expected="numbers",
                got="others",
                fix="Lower the learning rate. Nothing was written.",
            )
        record = {
            "train_s": train_s,
            "num_trained_parameters": num_trained,
            "num_steps": self._num_steps,
            "last_losses": figures,
        }
        self._write(merged, record)
        return settings.out

    def _load(self) -> BaseModel:
        """A frozen base model in float32."""
        base = load_base_model(
            self.settings.model,
            device=self.settings.device,
            mixed_precision=self.settings.mixed_precision,
        )
        base.model.float()
        return base

    def _task(self, parts: dict[str, list[Row]]) -> Task:
        max_tokens = min(self.settings.max_tokens, self.base.max_tokens)
        encoded = {
            name: encode_rows(rows, self.base.tokenizer, max_tokens=max_tokens)
            for name, rows in parts.items()
        }
        return Task(
            model=self.base,
            load_copy=self._load,
            rows=parts["forget"],
            max_tokens=max_tokens,
            seed=self.settings.seed,
            weighting=self.settings.weighting,
            **encoded,
        )

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters that learn, with their rates; everything else stays frozen."""
        rate, adapter = self.method.learning_rate, self.settings.adapter
        if adapter is None:
            learned = self.method.parameters(self.base.model)
            for parameter in learned.values():
                parameter.requires_grad_(True)
            return [{"params": [*learned.values()], "lr": rate}]
        return adapter.groups(self.base.model, rate)

    def _fit(self, groups: list[dict[str, Any]], forget_loss: ForgetLoss) -> dict[str, float]:
        task, method = self.task, self.method

        def batch(rows: Sequence[EncodedRow], step: int) -> Batch:
            return task.batch(rows, at_step(rows, method.batch_rows, step, task.seed))

        def losses(step: int) -> dict[str, Tensor]:
            terms = {"forget": forget_loss(batch(task.forget, step))}
            if isinstance(method, Retaining):
                kept = method.retain_loss(task, batch(task.retain, step))
                terms["retain"] = method.retain_weight * kept
            return terms

        with self.reporter.stage(name_of(method), self._num_steps) as stage:
            return fit(
                groups,
                losses,
                num_steps=self._num_steps,
                warmup_steps=self._steps_per_epoch,
                weight_decay=method.weight_decay,
                stage=stage,
            )

    @property
    def _steps_per_epoch(self) -> int:
        return -(-len(self.task.forget) // self.method.batch_rows)

    @property
    def _num_steps(self) -> int:
        return self.method.epochs * self._steps_per_epoch

    def _write(self, model: PreTrainedModel, record: dict[str, Any]) -> None:
        """The folder appears whole, or not at all."""
        out = self.settings.out
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        try:
            with without_progress_bar():
                model.save_pretrained(partial)
            self.base.tokenizer.save_pretrained(partial)
            content = self._record() | record
            (partial / METHOD_FILE).write_text(
                json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8"
            )
            partial.chmod(0o755)
            partial.rename(out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def _record(self) -> dict[str, Any]:
        settings = self.settings
        adapter, weighting = settings.adapter, settings.weighting
        return {
            "method": name_of(self.method),
            "settings": described(self.method),
            "adapter": described(adapter) if adapter else None,
            "weighting": {"name": type(weighting).__name__, **described(weighting)},
            "mixed_precision": settings.mixed_precision,
            "max_tokens": self.task.max_tokens,
            "seed": settings.seed,
            "base_model": self.base.info.model_dump(),
            "data": {name: digest.model_dump() for name, digest in self.digests.items()},
            "hardware": hardware(self.base),
            "versions": versions(),
        }
