"""Negative preference optimisation, alone and beside a loss on retained rows.

Legend: B batch.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor
from torch.nn import functional as F

from trainer.batches import Batch

from .base import ForgetLoss, Method, RetainKl, RetainNll, Task
from .fields import check_positive
from .terms import sequence_nll


def npo_loss(nll: Tensor, reference_nll: Tensor, beta: float) -> Tensor:
    """-(2 / beta) mean log sigmoid(beta (nll - nll_ref)). Shapes: (B,), (B,) -> ()."""
    return -2 / beta * F.logsigmoid(beta * (nll - reference_nll)).mean()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Npo(Method):
    """Negative preference optimisation: DPO with the forgotten answer as the one not preferred, and no other.

    -(2 / beta) mean log sigmoid(-beta log(p(y | x) / p_base(y | x))). Sequence level: log p(y | x) is the
    sum over the answer's tokens. Tends to gradient ascent as beta -> 0. Source: Zhang et al. 2024 (arXiv
    2404.05868), section 3; beta 0.1.
    """

    epochs: int = 10
    beta: float = 0.1
    """> 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "beta")

    def forget_loss(self, task: Task) -> ForgetLoss:
        """See Method."""
        reference_nll = task.reference_nll(task.forget)

        def loss(batch: Batch) -> Tensor:
            nll = sequence_nll(task.model.logits(batch), batch.labels)
            return npo_loss(nll, reference_nll[list(batch.indices)], self.beta)

        return loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpoGd(RetainNll, Npo):
    """NPO beside gradient descent on retained answers ("NPO-RT"). Source: arXiv 2404.05868, section 5.1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NpoKl(RetainKl, Npo):
    """NPO beside KL from the base model on retained rows. Source: arXiv 2404.05868, section 5.1."""
