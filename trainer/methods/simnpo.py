"""Simple negative preference optimisation.

Legend: B batch.
"""

from __future__ import annotations

import dataclasses

from torch import Tensor
from torch.nn import functional as F

from trainer.batches import Batch
from trainer.losses import answer_nll

from .base import ForgetLoss, RetainNll, Task
from .fields import check_positive, check_range


def simnpo_loss(nll_per_token: Tensor, beta: float, gamma: float) -> Tensor:
    """-(2 / beta) mean log sigmoid(beta nll / |y| - gamma). Shapes: (B,) -> ()."""
    return -2 / beta * F.logsigmoid(beta * nll_per_token - gamma).mean()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SimNpo(RetainNll):
    """NPO without a reference model, by length-normalised answers, beside descent on retained ones.

    -(2 / beta) mean log sigmoid(-(beta / |y|) log p(y | x) - gamma) + retain_weight L(retain). Sequence
    level: one log sigmoid an answer, of its mean over |y| tokens. Source: Fan et al. 2024 (arXiv
    2410.07163), section 5; beta 2.5 and gamma 0 on TOFU.
    """

    epochs: int = 10
    beta: float = 2.5
    """> 0."""
    gamma: float = 0.0
    """Reward margin, >= 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "beta")
        check_range(self, "gamma", self.gamma >= 0, ">= 0")

    def forget_loss(self, task: Task) -> ForgetLoss:
        """See Method."""

        def loss(batch: Batch) -> Tensor:
            nll = answer_nll(task.model.logits(batch), batch.labels)
            return simnpo_loss(nll, self.beta, self.gamma)

        return loss
