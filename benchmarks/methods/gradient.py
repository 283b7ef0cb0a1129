"""Contenders that train weights, or an adapter, down a loss."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from alter_core.errors import ConfigError
from alter_eval.models import TransformersModel
from trainer.base_model import load_base_model
from trainer.methods import (
    METHOD_FILE,
    METHODS,
    WEIGHTINGS,
    KnowledgeSpanWeighting,
    Retaining,
    UnlearnSettings,
    Weighting,
    make_method,
    unlearn,
)

from .contenders import EPOCHS, Gradient
from .search import Criterion, Trial, search
from .tasks import Task, TofuTask
from .unlearned import Opened, Unlearned


def searched(
    contender: Gradient,
    task: Task,
    criterion: Criterion,
    *,
    num_trials: int,
    seed: int,
    scratch: Path,
) -> list[Trial]:
    """Learning rates that were tried; their models stay in `scratch`, where `run` finds them."""
    return search(
        lambda rate: load_base_model(_folder(contender, task, rate, seed, scratch)),
        criterion,
        start=contender.rate,
        num_trials=num_trials,
    )


def run(contender: Gradient, task: Task, rate: float, *, seed: int, scratch: Path) -> Unlearned:
    """The task unlearned at that rate."""
    folder = _folder(contender, task, rate, seed, scratch)
    record = json.loads((folder / METHOD_FILE).read_bytes())
    return Unlearned(
        train_s=record["train_s"],
        num_parameters=record["num_trained_parameters"],
        settings={"learning_rate": rate},
        open=functools.partial(_opened, folder, task),
    )


@contextlib.contextmanager
def _opened(folder: Path, task: Task) -> Iterator[Opened]:
    base = load_base_model(folder)
    judge = TransformersModel(load_base_model(task.base_folder))
    yield Opened(base=base, model=TransformersModel(base), judge=judge)


def _folder(contender: Gradient, task: Task, rate: float, seed: int, scratch: Path) -> Path:
    out = scratch / f"{task.name}-{rate:.3e}-{seed}"
    if not out.exists():
        method = make_method(
            contender.method, learning_rate=rate, epochs=EPOCHS, **contender.settings
        )
        unlearn(
            UnlearnSettings(
                model=task.base_folder,
                out=out,
                method=method,
                forget=(task.forget,),
                retain=(task.retain,) if issubclass(METHODS[contender.method], Retaining) else (),
                adapter=contender.adapter,
                weighting=_weighting(contender.weighting, task),
                seed=seed,
            )
        )
    return out


def _weighting(name: str, task: Task) -> Weighting:
    kind = WEIGHTINGS[name]
    if not issubclass(kind, KnowledgeSpanWeighting):
        return kind()
    perturbed, paraphrased = perturbed_answers(task)
    return kind(perturbed_answers=perturbed, paraphrased_answers=paraphrased)


def perturbed_answers(task: Task) -> tuple[Sequence[Sequence[str]], Sequence[str]]:
    """Of every forgotten row its perturbed answers, and the paraphrase that they were made from.

    Raises: ConfigError unless the task is TOFU's, whose evaluation data they are.
    """
    if not isinstance(task, TofuTask):
        raise ConfigError(
            "Knowledge spans need answers that differ in the facts alone",
            expected="tofu",
            got=task.name,
        )
    rows = task.bench.split.measured["forget"]
    return (
        [row.perturbed_answers for row in rows],
        [row.paraphrased_answer or row.answer for row in rows],
    )


def discard(scratch: Path) -> None:
    """Removes the models that were tried."""
    shutil.rmtree(scratch, ignore_errors=True)
