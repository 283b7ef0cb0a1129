"""The router: Eq. 7 with its temperature over {retain, domain 1..N}, and the path choice of Eq. 9.

Legend: T tokens, N forget domains, E = 1 + N experts; column 0 is the retain expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import AlterConfig


def expert_weights(domain_logits: Tensor, is_high: Tensor, config: AlterConfig) -> Tensor:
    """Weights of all experts for every token, Eq. 7 and 9.

    Low-entropy path: weight 1 on the expert with the largest logit among {retain (logit 0), 1..N}.
    High-entropy path: weight 1 on the retain expert (the `A x` of Eq. 9, read as B_r A x), plus the
    softmax weight at `temperature_high` of the `top_k` best domains. A domain that does not beat retain
    gets exactly 0.

    Shapes: domain_logits (..., T, N), is_high (..., T) bool -> (..., T, E) float32.
    """
    logits = domain_logits.float()
    beats_retain = logits > 0
    num_domains = logits.shape[-1]
    retain_logit = logits.new_zeros((*logits.shape[:-1], 1))
    with_retain = torch.cat([retain_logit, logits], dim=-1)

    best = with_retain.argmax(dim=-1, keepdim=True)
    low = torch.zeros_like(with_retain).scatter_(-1, best, 1.0)

    high = torch.softmax(with_retain / config.temperature_high, dim=-1)[..., 1:]
    high = torch.where(beats_retain, high, 0.0)
    if num_domains > config.top_k:
        kept = high.topk(config.top_k, dim=-1)
        high = torch.zeros_like(high).scatter_(-1, kept.indices, kept.values)
    high = torch.cat([torch.ones_like(retain_logit), high], dim=-1)
    return torch.where(is_high.unsqueeze(-1), high, low)


def scalar_logits(entropy: Tensor, weight: Tensor) -> Tensor:
    """Eq. 7 taken literally: W_g^T S_q, from the scalar entropy alone.

    Since S_q >= 0, the argmax is one constant expert for every token: it cannot route. Kept for
    ablation on the reference path.

    Shapes: entropy (..., T), weight (N,) -> (..., T, N).
    """
    return entropy.unsqueeze(-1) * weight
