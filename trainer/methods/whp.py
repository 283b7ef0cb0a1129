"""Who's Harry Potter: learning generic predictions in place of those that more training brings up.

Legend: B batch, T tokens, V vocabulary, N answer tokens of a row.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from trainer.base_model import BaseModel
from trainer.batches import IGNORED, Batch, at_step
from trainer.dataset import EncodedRow
from trainer.losses import token_nll

from .base import Task, TokenLoss, TokenMethod
from .fields import check_positive
from .fit import fit
from .terms import mean_nll


def generic_logits(baseline: Tensor, reinforced: Tensor, alpha: float) -> Tensor:
    """v_base - alpha relu(v_reinforced - v_base). Shapes: (..., V), (..., V) -> (..., V). float32 inside."""
    baseline = baseline.float()
    return baseline - alpha * torch.relu(reinforced.float() - baseline)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whp(TokenMethod):
    """Who's Harry Potter: descent on generic labels, argmax v_base - alpha relu(v_reinforced - v_base).

    v are logits at the forgotten answers, v_reinforced those of a copy of the base model that was trained
    on the answers for some more epochs: what it raises is specific to them. Token level. Source: Eldan &
    Russinovich 2023 (arXiv 2310.02238), Eq. 1; their dictionary of anchored terms, which another language
    model writes, is left out. A model that knows the rows by heart moves slowly: reinforce at length.
    """

    alpha: float = 5.0
    """How far what was raised is pushed down, > 0."""
    reinforce_learning_rate: float = 1e-5
    """Peak rate of the reinforced copy, > 0."""
    reinforce_epochs: int = 3
    """Of the reinforced copy over the forgotten rows, > 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "alpha", "reinforce_learning_rate", "reinforce_epochs")

    def token_loss(self, task: Task) -> TokenLoss:
        """See TokenMethod."""
        labels = self.generic_labels(task)

        def loss(logits: Tensor, batch: Batch) -> Tensor:
            generic = batch.align_labels(labels)
            return token_nll(logits, generic.where(batch.labels != IGNORED, IGNORED))

        return loss

    def generic_labels(self, task: Task) -> list[Tensor]:
        """The token to predict instead of every token of the forgotten rows. Shapes: per row (T,)."""
        reinforced = self._reinforced(task)
        return [self._labels_of(row, task, reinforced) for row in task.forget]

    @torch.no_grad()
    def _labels_of(self, row: EncodedRow, task: Task, reinforced: BaseModel) -> Tensor:
        batch = task.batch([row], [0])
        # The trained model still is the base model.
        generic_TV = generic_logits(
            task.model.logits(batch)[0], reinforced.logits(batch)[0], self.alpha
        )
        # Position t predicts token t + 1; nothing predicts the first.
        return torch.tensor(row.ids[:1] + tuple(generic_TV[:-1].argmax(dim=-1).tolist()))

    def _reinforced(self, task: Task) -> BaseModel:
        copy = task.load_copy()
        copy.model.requires_grad_(True)

        def losses(step: int) -> dict[str, Tensor]:
            batch = task.batch(task.forget, at_step(task.forget, self.batch_rows, step, task.seed))
            return {"reinforced": mean_nll(copy.logits(batch), batch.labels)}

        steps_per_epoch = -(-len(task.forget) // self.batch_rows)
        fit(
            [{"params": [*copy.model.parameters()], "lr": self.reinforce_learning_rate}],
            losses,
            num_steps=self.reinforce_epochs * steps_per_epoch,
            warmup_steps=steps_per_epoch,
            weight_decay=self.weight_decay,
        )
        return copy
