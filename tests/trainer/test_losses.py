from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alter_core.entropy import tsallis_entropy
from trainer.batches import IGNORED
from trainer.losses import (
    LossTerm,
    capped_loss,
    inverted_hinge_loss,
    isolated_gradients,
    masked_mean,
    structural_term,
)

B, T, V = 2, 3, 7


def _reference_ihl(logits: list[float], target: int) -> float:
    """Written anew: 1 + p(target) - the largest other probability."""
    weights = [math.exp(value - max(logits)) for value in logits]
    probabilities = [weight / sum(weights) for weight in weights]
    others = [p for token, p in enumerate(probabilities) if token != target]
    return 1 + probabilities[target] - max(others)


@given(
    st.lists(st.floats(-30, 30), min_size=V, max_size=V),
    st.integers(0, V - 1),
)
def test_ihl_equals_an_independent_reference_and_lies_in_0_to_2(
    logits: list[float], target: int
) -> None:
    value = inverted_hinge_loss(torch.tensor([[logits]]), torch.tensor([[target]])).item()
    assert value == pytest.approx(_reference_ihl(logits, target), abs=1e-5)
    assert 0 <= value <= 2


def test_losses_leave_unlabelled_positions_at_0() -> None:
    logits = torch.randn(B, T, V, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[3, IGNORED, 1], [IGNORED, IGNORED, 6]])
    for values in (inverted_hinge_loss(logits, labels), capped_loss(logits, labels, 5.0)):
        assert values.shape == (B, T)
        assert torch.equal(values == 0, labels == IGNORED)


def test_capped_loss_pushes_below_the_cap_and_not_beyond() -> None:
    logits = torch.zeros(1, 2, V)
    logits[0, 0, 0], logits[0, 1, 0] = 5.0, -20.0
    logits.requires_grad_(True)
    values = capped_loss(logits, torch.zeros(1, 2, dtype=torch.long), cap=8.0)
    (gradient,) = torch.autograd.grad(values.sum(), logits)
    assert values[0, 1].item() == -8.0
    assert gradient[0, 0, 0] > 0, "descending lowers the known token's logit"
    assert not gradient[0, 1].any()


def test_mean_over_nothing_is_0_and_differentiable() -> None:
    values = torch.ones(B, T, requires_grad=True)
    mean = masked_mean(values, torch.zeros(B, T, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(mean, values)
    assert mean.item() == 0
    assert not gradient.any()


def test_a_term_reaches_only_the_parameters_it_names() -> None:
    a, b, c = (torch.tensor(value, requires_grad=True) for value in (2.0, 3.0, 5.0))
    product = a * b * c
    gradients = isolated_gradients(
        [
            LossTerm(name="one", value=product, parameters=(a,)),
            LossTerm(name="two", value=product * 2, parameters=(b, a)),
        ]
    )
    assert {id(p): g.item() for p, g in gradients.items()} == {id(a): 45.0, id(b): 20.0}
    assert all(parameter.grad is None for parameter in (a, b, c))


def test_structural_term_is_the_squared_gradient_of_one_high_token() -> None:
    generator = torch.Generator().manual_seed(1)
    lora_a = torch.randn(4, 5, generator=generator).requires_grad_(True)
    x = torch.randn(B, T, 5, generator=generator)
    head = torch.randn(V, 4, generator=generator)
    logits = x @ lora_a.T @ head.T
    is_high = torch.zeros(B, T, dtype=torch.bool)
    is_high[1, 2] = True
    term = structural_term(logits, is_high, [lora_a], 1.5, torch.Generator())

    apart = lora_a.detach().clone().requires_grad_(True)
    entropy = tsallis_entropy(x[1, 2] @ apart.T @ head.T, 1.5)
    (gradient,) = torch.autograd.grad(entropy, apart)
    assert term.item() == pytest.approx(gradient.pow(2).sum().item(), rel=1e-5)
    (second,) = torch.autograd.grad(term, lora_a)
    assert second.abs().max() > 0
    none = structural_term(logits, torch.zeros_like(is_high), [lora_a], 1.5, generator)
    assert none.item() == 0
