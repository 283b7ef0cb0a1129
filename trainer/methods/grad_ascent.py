"""Gradient ascent."""

from __future__ import annotations

import dataclasses

from trainer.losses import token_nll

from .base import Task, TokenLoss, TokenMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradAscent(TokenMethod):
    """Gradient ascent on the forgotten answers: mean over tokens of log p(y_t | x, y_<t).

    Token level. Source: Thudi et al. 2022 (arXiv 2109.13398); for language models Jang et al. 2023 (arXiv
    2210.01504); the mean over tokens as in TOFU (arXiv 2401.06121).
    """

    def token_loss(self, task: Task) -> TokenLoss:
        """See TokenMethod."""
        return lambda logits, batch: -token_nll(logits, batch.labels)
