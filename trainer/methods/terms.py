"""Sums and means that the methods' losses are made of. float32 inside.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from trainer.batches import IGNORED
from trainer.losses import token_nll, weighted_mean


def mean_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean -log p of the batch's answer tokens. Shapes: (B, T, V), (B, T) -> ()."""
    return weighted_mean(token_nll(logits, labels), (labels != IGNORED).float())


def sequence_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of each whole answer: the sum over its tokens. Shapes: (B, T, V), (B, T) -> (B,)."""
    return token_nll(logits, labels).sum(dim=1)


def mean_kl(reference: Tensor, logits: Tensor, attention_mask: Tensor) -> Tensor:
    """Mean over the batch's tokens of KL(reference || model), both given by logits.

    Counts every position that predicts a token of its own row, questions included.
    Shapes: (B, T, V), (B, T, V), (B, T) -> ().
    """
    divergence_BT = F.kl_div(
        logits.float().log_softmax(dim=-1),
        reference.float().log_softmax(dim=-1),
        reduction="none",
        log_target=True,
    ).sum(dim=-1)
    # The last token of a row predicts nothing of it.
    predicts = F.pad(attention_mask[:, 1:], (0, 1))
    return weighted_mean(divergence_BT, predicts.float())
