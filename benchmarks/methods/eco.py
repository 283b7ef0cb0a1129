"""ECO: prompts that a classifier flags are corrupted, so far that answers come out as unlikely as to a model
that never learned them (`alter_eval.eco`)."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from statistics import fmean

from alter_eval.eco import EcoModel, PromptClassifier, search_strength
from alter_eval.models import TransformersModel
from benchmarks.tofu.experiment import encoded_files
from trainer.base_model import load_base_model
from trainer.dataset import EncodedRow

from .search import Criterion
from .tasks import Task
from .unlearned import Opened, Unlearned

_SEARCH_STEPS = 10
_SHARE_OF_NORM = 100.0
"""The search begins with noise of so many times the embeddings' standard deviation, in one dimension."""


def run(task: Task, criterion: Criterion, *, seed: int) -> Unlearned:
    """The task's classifier, and the strength that fits its rows."""
    started = time.monotonic()
    base = load_base_model(task.base_folder)
    retain = encoded_files(base, task.retain, *task.general)
    classifier = PromptClassifier(_prompts(criterion.forget), _prompts(retain))

    def distance(strength: float) -> float:
        model = EcoModel(base, classifier, strength=strength, seed=seed)
        found = fmean(scores.nll for scores in model.score(criterion.forget))
        return abs(found - criterion.ignorant_loss) / criterion.ignorant_loss

    deviation = base.model.get_input_embeddings().weight.float().std().item()
    found = search_strength(distance, strength=_SHARE_OF_NORM * deviation, num_steps=_SEARCH_STEPS)
    return Unlearned(
        train_s=time.monotonic() - started,
        num_parameters=0,
        settings={"strength": found.strength, "distance": found.distance},
        open=functools.partial(_opened, task, classifier, found.strength, seed),
    )


@contextlib.contextmanager
def _opened(
    task: Task, classifier: PromptClassifier, strength: float, seed: int
) -> Iterator[Opened]:
    base = load_base_model(task.base_folder)
    yield Opened(
        base=base,
        model=EcoModel(base, classifier, strength=strength, seed=seed),
        judge=TransformersModel(base),
    )


def _prompts(rows: list[EncodedRow] | tuple[EncodedRow, ...]) -> list[tuple[int, ...]]:
    """Of rows that have one."""
    return [row.ids[: row.num_prompt] for row in rows if row.num_prompt > 0]
