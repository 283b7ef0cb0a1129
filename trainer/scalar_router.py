"""The literal router of Eq. 7, for ablation: one weight per domain on the scalar entropy.

Legend: N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_STEPS = 200
_LEARNING_RATE = 0.05


def train_scalar_weight(forget: Sequence[Tensor], retain: Sequence[Tensor]) -> float:
    """The domain's entry of W_g, by logistic regression on S_q without a bias, as Eq. 7 has none.

    Since S_q >= 0 the logit has one sign for every token: the result routes all tokens or none.
    """
    entropy_N = torch.cat([*forget, *retain]).float()
    num_forget = sum(len(values) for values in forget)
    target_N = (torch.arange(len(entropy_N)) < num_forget).float()
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=_LEARNING_RATE)
    for _ in range(_STEPS):
        loss = F.binary_cross_entropy_with_logits(weight * entropy_N, target_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return float(weight)
