"""Token entropy (Eq. 3 and 5 of arXiv 2603.01792) and its one-pass estimator.

Legend: B batch, T tokens, D hidden, V vocabulary, H estimator units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def shannon_entropy(logits: Tensor) -> Tensor:
    """Shannon entropy in nats, Eq. 3: H = -sum_i p_i log p_i.

    Shapes: logits (..., V) -> (...). float32 inside and out.
    """
    log_p = _log_probabilities(logits)
    return -(log_p.exp() * log_p).sum(dim=-1)


def tsallis_entropy(logits: Tensor, q: float) -> Tensor:
    """Tsallis entropy, Eq. 5: S_q = (1 - sum_i p_i^q) / (q - 1), q > 0.

    The limit q -> 1 is Shannon entropy. Written as sum_i p_i^m (1 - p_i^d) / d with m = min(q, 1),
    d = |q - 1| and `expm1`, so that it stays exact in float32 next to q = 1.

    Shapes: logits (..., V) -> (...). float32 inside and out.
    Raises: ValueError if q <= 0.
    """
    if q <= 0:
        raise ValueError(f"tsallis_q must be > 0, got {q}")
    if q == 1:
        return shannon_entropy(logits)
    log_p, distance = _log_probabilities(logits), abs(q - 1)
    terms = (min(q, 1.0) * log_p).exp() * torch.expm1(distance * log_p)
    return -terms.sum(dim=-1) / distance


def max_tsallis_entropy(q: float, vocab_size: float = float("inf")) -> float:
    """Upper bound of S_q over `vocab_size` outcomes, reached by the uniform distribution."""
    if q == 1:
        return math.log(vocab_size)
    return -math.expm1((1 - q) * math.log(vocab_size)) / (q - 1)


def _log_probabilities(logits: Tensor) -> Tensor:
    """Finite, since -inf * 0 is nan: an impossible token adds nothing to any entropy."""
    return torch.log_softmax(logits.float(), dim=-1).clamp_min(torch.finfo(torch.float32).min)


class EntropyEstimator(nn.Module):
    """Estimates S_q(j) from the residual stream at the tap layer, before the last layer has run.

    s = softplus(w2 . relu(W1 (h / rms(h)) + b1) + b2). Computed in float32. A token is on the
    high-entropy path if s exceeds the configured threshold.
    """

    def __init__(self, hidden_size: int, num_units: int = 64) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, num_units)
        self.fc2 = nn.Linear(num_units, 1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Shapes: hidden_states (..., D) -> (...), float32, >= 0."""
        h = hidden_states.float()
        h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
        return nn.functional.softplus(self.fc2(torch.relu(self.fc1(h))).squeeze(-1))
