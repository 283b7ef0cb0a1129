"""Inverted hinge loss."""

from __future__ import annotations

import dataclasses

from trainer.losses import inverted_hinge_loss

from .base import RetainNll, Task, TokenLoss, TokenMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class InvertedHinge(RetainNll, TokenMethod):
    """Inverted hinge loss beside descent on retained answers: under an adapter, ALTER's AsymLoRA baseline.

    Mean over tokens of 1 + p(y_t) - max_{v != y_t} p(v), which is bounded, plus retain_weight L(retain).
    Token level. Source: LoKU, Cha et al. 2025 (arXiv 2408.06621); ALTER, Eq. 4 (arXiv 2603.01792).
    """

    def token_loss(self, task: Task) -> TokenLoss:
        """See TokenMethod."""
        return lambda logits, batch: inverted_hinge_loss(logits, batch.labels)
