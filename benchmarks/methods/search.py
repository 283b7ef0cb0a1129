"""The same small search for every method: a learning rate by bisection, a few trainings long.

Nothing of the evaluation is looked at, and no retrained model: how far forgetting should go is told by how
likely a model that never learned the rows would find them (`trainer.levels`), as ALTER's experts are told.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from statistics import fmean

import torch

from alter_core.errors import TrainingError
from benchmarks.tofu.experiment import encoded_files
from trainer.base_model import BaseModel, load_base_model
from trainer.counterfactual import Counterfactuals
from trainer.dataset import EncodedRow
from trainer.evaluation import answer_losses
from trainer.levels import ignorant_logprobs
from trainer.settings import ExpertSettings

from .tasks import Task

_FACTOR = 2.0
"""Between rates, until forgetting too little and too much are both seen."""
_GOOD_ENOUGH = 0.15
"""A score at which the search ends."""
_RETAINED_STRIDE = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """A training, and how far it is from what is wanted."""

    value: float
    """What was searched for: a learning rate."""
    forget_loss: float
    """Mean over forgotten rows, nats per answer token; infinite where training broke down."""
    score: float
    """0 is best: see `Criterion`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Criterion:
    """|L_forget - L_ignorant| / L_ignorant, at most 1, plus the share lost of retained probability."""

    forget: Sequence[EncodedRow]
    retain: Sequence[EncodedRow]
    ignorant_loss: float
    """Of the forgotten rows, nats per answer token, for a model that never learned them."""
    retained_probability: float
    """Of the base model."""

    @classmethod
    def of(cls, task: Task, seed: int) -> Criterion:
        """Of a task's training rows; every fourth retained one is read."""
        base = load_base_model(task.base_folder)
        forget, retain = encoded_files(base, task.forget), encoded_files(base, task.retain)
        texts = [row.ids for row in (*retain, *encoded_files(base, *task.general))]
        words = Counterfactuals(
            base.tokenizer,
            texts,
            [row.ids for row in forget],
            kept_share=ExpertSettings().kept_share,
        )
        levels = ignorant_logprobs(base, forget, words, seed=seed)
        losses = [
            -level[torch.tensor(row.is_answer[1:])].mean().item()
            for level, row in zip(levels, forget, strict=True)
        ]
        retain = retain[::_RETAINED_STRIDE]
        return cls(
            forget=forget,
            retain=retain,
            ignorant_loss=fmean(losses),
            retained_probability=_probability(base, retain),
        )

    def trial(self, value: float, model: BaseModel) -> Trial:
        """What a model that was trained at `value` is worth."""
        forget_loss = fmean(answer_losses(model, self.forget))
        distance = min(1.0, abs(forget_loss - self.ignorant_loss) / self.ignorant_loss)
        kept = _probability(model, self.retain) / self.retained_probability
        return Trial(value=value, forget_loss=forget_loss, score=distance + max(0.0, 1 - kept))


def search(
    train: Callable[[float], BaseModel], criterion: Criterion, *, start: float, num_trials: int
) -> list[Trial]:
    """Trials of `train`, in order: higher while too little is forgotten, lower while too much is. At most
    `num_trials`."""
    low, high, value = 0.0, math.inf, start
    trials = []
    for _ in range(num_trials):
        try:
            trial = criterion.trial(value, train(value))
        except TrainingError:
            trial = Trial(value=value, forget_loss=math.inf, score=math.inf)
        trials.append(trial)
        if trial.score <= _GOOD_ENOUGH:
            break
        if trial.forget_loss < criterion.ignorant_loss:
            low = value
        else:
            high = value
        if low == 0:
            value = high / _FACTOR
        elif math.isinf(high):
            value = low * _FACTOR
        else:
            value = math.sqrt(low * high)
    return trials


def best(trials: Sequence[Trial]) -> Trial:
    """The trial of the lowest score. Raises: TrainingError if all broke down."""
    found = min(trials, key=lambda trial: trial.score)
    if math.isinf(found.score):
        raise TrainingError(
            "Training broke down at every rate that was tried",
            expected="finite losses at one of them",
            got=", ".join(f"{trial.value:.1e}" for trial in trials),
            fix="Begin the search lower.",
        )
    return found


def _probability(model: BaseModel, rows: Sequence[EncodedRow]) -> float:
    return fmean(math.exp(-loss) for loss in answer_losses(model, rows))
