"""Alternating token-weighted unlearning (ATWU): weights of answer tokens, learned beside what forgets them.

w_t = sigmoid(v . h_t + c), h_t being the last hidden state where y_t is predicted. After the forget loss has
read the weights, v and c take a step of their own down `atwu_objective`: tokens whose forget loss falls gain
weight, tokens whose loss is held up lose it. Source: Yüce et al. 2026 (arXiv 2606.06320).

Our reading, since the paper leaves it open or out of reach: losses are centred, so that the budget alone sets
how much is forgotten; both regularisers' weights and the scorer's rate are ours.

Legend: D hidden, N answer tokens of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alter_core.errors import ConfigError

from .checkpoint import adam_tensors, restore, restore_adam


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtwuSettings:
    """How the weights are learned.

    Raises: ConfigError where a field is out of range.
    """

    scorer_learning_rate: float = 1e-3
    """Of Adam, > 0."""
    entropy_weight: float = 0.1
    """Of the binary entropy, which pushes weights to 0 or 1; >= 0."""
    budget: float = 0.2
    """Mean weight that is aimed at, in (0, 1)."""
    budget_weight: float = 10.0
    """> 0."""

    def __post_init__(self) -> None:
        for name, is_valid, expected in (
            ("scorer_learning_rate", self.scorer_learning_rate > 0, "> 0"),
            ("entropy_weight", self.entropy_weight >= 0, ">= 0"),
            ("budget", 0 < self.budget < 1, "in (0, 1)"),
            ("budget_weight", self.budget_weight > 0, "> 0"),
        ):
            if not is_valid:
                raise ConfigError(
                    f"{name} is out of range", expected=expected, got=str(getattr(self, name))
                )


def atwu_objective(
    scores: Tensor, losses: Tensor, *, entropy_weight: float, budget: float, budget_weight: float
) -> Tensor:
    """mean w (l - mean l) + entropy_weight mean h(w) + budget_weight (mean w - budget)^2.

    w = sigmoid(scores), h(w) = -w log w - (1 - w) log(1 - w), in nats. Shapes: (N,), (N,) -> ().
    """
    weights = scores.sigmoid()
    conflict = (weights * (losses - losses.mean())).mean()
    # h in scores, where neither logarithm can be of 0.
    entropy = (F.softplus(scores) - weights * scores).mean()
    return conflict + entropy_weight * entropy + budget_weight * (weights.mean() - budget).square()


class TokenScorer:
    """v, c and their optimiser. Both start at 0, so that every weight starts at 0.5."""

    def __init__(self, settings: AtwuSettings, hidden_size: int, device: torch.device) -> None:
        self.settings = settings
        self.linear = nn.Linear(hidden_size, 1, device=device)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.optimizer = torch.optim.Adam(
            self.linear.parameters(), lr=settings.scorer_learning_rate
        )

    def __call__(self, hidden_ND: Tensor, losses_N: Tensor) -> Tensor:
        """The tokens' weights as they are; then takes a step by the tokens' losses.

        Nothing is learned through the weights, nor by what made the hidden states and losses.
        Shapes: (N, D), (N,) -> (N,) float32.
        """
        if not len(losses_N):  # nothing to learn from, and means of it would spoil the scorer
            return losses_N.detach().float()
        scores_N = self.linear(hidden_ND.detach().float()).squeeze(-1)
        objective = atwu_objective(
            scores_N,
            losses_N.detach(),
            entropy_weight=self.settings.entropy_weight,
            budget=self.settings.budget,
            budget_weight=self.settings.budget_weight,
        )
        self.optimizer.zero_grad()
        objective.backward()
        self.optimizer.step()
        return scores_N.detach().sigmoid()

    def tensors(self) -> dict[str, Tensor]:
        """v, c and the optimiser's state, as a checkpoint holds them."""
        parameters = self._parameters()
        values = {name: parameter.detach() for name, parameter in parameters.items()}
        return values | adam_tensors(self.optimizer, parameters)

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes back to what `tensors` gave."""
        restore(self._parameters(), tensors)
        restore_adam(self.optimizer, self._parameters(), tensors)

    def _parameters(self) -> dict[str, Tensor]:
        return {f"atwu.{name}": value for name, value in self.linear.named_parameters()}
