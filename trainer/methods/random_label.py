"""Random labels."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from trainer.batches import IGNORED, Batch
from trainer.losses import token_nll

from .base import Task, TokenLoss, TokenMethod


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomLabel(TokenMethod):
    """Descent on random answers: mean over tokens of -log p(z_t | x, y_<t), z_t uniform over the vocabulary.

    Token level; the true answer is read, random tokens are to be predicted, drawn anew every time. Source:
    Yao et al. 2024 (arXiv 2402.15159), "fine-tuning with random labels".
    """

    def token_loss(self, task: Task) -> TokenLoss:
        """See TokenMethod."""
        generator = torch.Generator().manual_seed(task.seed)

        def loss(logits: Tensor, batch: Batch) -> Tensor:
            drawn = torch.randint(logits.shape[-1], batch.labels.shape, generator=generator)
            labels = drawn.to(batch.labels.device).where(batch.labels != IGNORED, IGNORED)
            return token_nll(logits, labels)

        return loss
