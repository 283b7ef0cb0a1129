"""The terms of Eq. 8, and the gradient isolation between them.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from alter_core.entropy import tsallis_entropy

from .batches import IGNORED

TokenLossName = Literal["ihl", "capped"]
TokenLoss = Callable[[Tensor, Tensor], Tensor]
"""Per-token loss from logits and labels. Shapes: (B, T, V), (B, T) -> (B, T)."""


def inverted_hinge_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """IHL of every labelled token: 1 + p(x_t) - max_{v != x_t} p(v), in [0, 2] (LoKU); 0 elsewhere.

    Shapes: logits (B, T, V), labels (B, T) -> (B, T) float32.
    """
    is_labelled = labels != IGNORED
    targets = labels.clamp_min(0).unsqueeze(-1)
    probabilities = torch.softmax(logits.float(), dim=-1)
    target = probabilities.gather(-1, targets).squeeze(-1)
    rival = probabilities.scatter(-1, targets, -1.0).amax(dim=-1)
    return torch.where(is_labelled, 1 + target - rival, 0.0)


def capped_loss(logits: Tensor, labels: Tensor, cap: float) -> Tensor:
    """-min(-log p(x_t), cap) of every labelled token: pushes its loss up to `cap` nats; 0 elsewhere.

    Shapes: logits (B, T, V), labels (B, T) -> (B, T) float32.
    """
    nll = token_nll(logits, labels)
    return -nll.clamp_max(cap)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(x_t) of every labelled token, 0 elsewhere. Shapes: (B, T, V), (B, T) -> (B, T) float32."""
    nll = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return nll.view(labels.shape)


def answer_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of -log p over each row's labelled tokens. Shapes: (B, T, V), (B, T) -> (B,) float32."""
    num_answer = (labels != IGNORED).sum(dim=1).clamp_min(1)
    return token_nll(logits, labels).sum(dim=1) / num_answer


def token_loss(name: TokenLossName, cap: float) -> TokenLoss:
    """The per-token forget loss of that name."""
    if name == "ihl":
        return inverted_hinge_loss
    return lambda logits, labels: capped_loss(logits, labels, cap)


def masked_mean(values: Tensor, is_selected: Tensor) -> Tensor:
    """Mean over selected positions; 0 (with a gradient of 0) where none is. Shapes: (B, T) -> ()."""
    return (values * is_selected).sum() / is_selected.sum().clamp_min(1)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """sum w v / sum w; 0 where all weights are. Shapes: two alike -> ()."""
    total = weights.sum()
    return (values * weights).sum() / total.where(total > 0, total.new_ones(()))


def structural_term(
    logits: Tensor,
    is_high: Tensor,
    lora_a: Sequence[Tensor],
    tsallis_q: float,
    generator: torch.Generator,
) -> Tensor:
    """E ||grad_A S_q(x_t)||^2 over high-entropy tokens, the third term of Eq. 8.

    The expectation is drawn: one token of the batch a step, an unbiased estimate, since a gradient per
    token would cost a backward pass each. Needs attention that can be differentiated twice.

    Shapes: logits (B, T, V), is_high (B, T) -> (), 0 where no token is high.
    """
    places = is_high.nonzero()
    if not len(places):
        return logits.new_zeros((), dtype=torch.float32)
    row, position = places[int(torch.randint(len(places), (1,), generator=generator))]
    entropy = tsallis_entropy(logits[row, position], tsallis_q)
    gradients = torch.autograd.grad(entropy, list(lora_a), create_graph=True, allow_unused=True)
    squares = [gradient.float().pow(2).sum() for gradient in gradients if gradient is not None]
    return torch.stack(squares).sum() if squares else logits.new_zeros((), dtype=torch.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One weighted term of Eq. 8 and the only parameters that may learn from it."""

    name: str
    value: Tensor
    parameters: tuple[Tensor, ...]


def isolated_gradients(terms: Sequence[LossTerm]) -> dict[Tensor, Tensor]:
    """Gradient of every term with respect to its own parameters, and to nothing else, summed.

    Parameters are left without `.grad`: what a term does not name cannot learn from it.
    """
    total: dict[Tensor, Tensor] = {}
    for term in terms:
        if not term.value.requires_grad:
            continue
        gradients = torch.autograd.grad(
            term.value, term.parameters, retain_graph=True, allow_unused=True
        )
        for parameter, gradient in zip(term.parameters, gradients, strict=True):
            if gradient is not None:
                total[parameter] = total[parameter] + gradient if parameter in total else gradient
    return total
