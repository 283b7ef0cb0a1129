"""The scorer of tokens: against plain Python, and what it learns."""

from __future__ import annotations

import math
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alter_core.errors import ConfigError
from trainer.atwu import AtwuSettings, TokenScorer, atwu_objective

N, D = 5, 3


def _tokens(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, D, generator=generator), torch.randn(N, generator=generator)


def _scorer(**settings: float) -> TokenScorer:
    return TokenScorer(AtwuSettings(**settings), D, torch.device("cpu"))


@given(
    st.lists(st.tuples(st.floats(-30, 30), st.floats(-20, 20)), min_size=1, max_size=6),
    st.floats(0, 2),
    st.floats(0.1, 0.9),
)
def test_objective_equals_an_independent_reference(
    tokens: list[tuple[float, float]], entropy_weight: float, budget: float
) -> None:
    weights = [1 / (1 + math.exp(-score)) for score, _ in tokens]
    center = fmean(loss for _, loss in tokens)

    def entropy(score: float) -> float:
        terms = (1 / (1 + math.exp(-score)), 1 / (1 + math.exp(score)))
        return -sum(p * math.log(p) for p in terms)

    expected = (
        fmean(w * (loss - center) for w, (_, loss) in zip(weights, tokens, strict=True))
        + entropy_weight * fmean(entropy(score) for score, _ in tokens)
        + 3 * (fmean(weights) - budget) ** 2
    )
    found = atwu_objective(
        torch.tensor([score for score, _ in tokens]),
        torch.tensor([loss for _, loss in tokens]),
        entropy_weight=entropy_weight,
        budget=budget,
        budget_weight=3.0,
    )
    assert found.item() == pytest.approx(expected, rel=1e-3, abs=1e-3)


class _PlainScorer:
    """The scorer in plain Python: a gradient by hand, and Adam as its paper has it."""

    def __init__(self, settings: AtwuSettings) -> None:
        self.settings, self.num_steps = settings, 0
        self.weights = [0.0] * (D + 1)
        self.mean, self.square = [0.0] * (D + 1), [0.0] * (D + 1)

    def __call__(self, hidden: list[list[float]], losses: list[float]) -> list[float]:
        inputs = [[*row, 1.0] for row in hidden]
        scores = [sum(a * b for a, b in zip(self.weights, row, strict=True)) for row in inputs]
        found = [1 / (1 + math.exp(-score)) for score in scores]
        excess = 2 * self.settings.budget_weight * (fmean(found) - self.settings.budget)
        slopes = [
            (loss - fmean(losses) - self.settings.entropy_weight * score + excess) * w * (1 - w)
            for loss, score, w in zip(losses, scores, found, strict=True)
        ]
        self.num_steps += 1
        for place in range(D + 1):
            gradient = fmean(s * row[place] for s, row in zip(slopes, inputs, strict=True))
            self._move(place, gradient)
        return found

    def _move(self, place: int, gradient: float) -> None:
        self.mean[place] = 0.9 * self.mean[place] + 0.1 * gradient
        self.square[place] = 0.999 * self.square[place] + 0.001 * gradient**2
        mean = self.mean[place] / (1 - 0.9**self.num_steps)
        square = self.square[place] / (1 - 0.999**self.num_steps)
        self.weights[place] -= (
            self.settings.scorer_learning_rate * mean / (math.sqrt(square) + 1e-8)
        )


def test_steps_equal_an_independent_reference() -> None:
    settings = AtwuSettings(
        scorer_learning_rate=0.07, entropy_weight=0.4, budget=0.3, budget_weight=2.0
    )
    scorer, plain = TokenScorer(settings, D, torch.device("cpu")), _PlainScorer(settings)
    for step in range(12):
        hidden, losses = _tokens(step)
        found = scorer(hidden, losses)
        expected = plain(hidden.tolist(), losses.tolist())
        assert found.tolist() == pytest.approx(expected, rel=1e-4)
        assert step > 0 or found.tolist() == [0.5] * N
    assert max(abs(w - 0.5) for w in expected) > 0.1


def test_nothing_learns_through_the_weights() -> None:
    hidden, losses = (values.requires_grad_() for values in _tokens(1))
    assert not _scorer()(hidden, losses).requires_grad
    assert hidden.grad is None
    assert losses.grad is None


def test_a_batch_without_tokens_leaves_the_scorer_as_it_is() -> None:
    scorer = _scorer()
    scorer(*_tokens(0))
    before = {name: tensor.clone() for name, tensor in scorer.tensors().items()}
    assert scorer(torch.zeros(0, D), torch.zeros(0)).shape == (0,)
    assert all(torch.equal(tensor, before[name]) for name, tensor in scorer.tensors().items())


def test_restored_scorer_goes_on_as_if_it_had_never_stopped() -> None:
    whole, resumed = _scorer(scorer_learning_rate=0.1), _scorer(scorer_learning_rate=0.1)
    for step in range(3):
        whole(*_tokens(step))
    resumed.restore({name: tensor.clone() for name, tensor in whole.tensors().items()})
    for step in range(3, 6):
        assert torch.equal(whole(*_tokens(step)), resumed(*_tokens(step)))


def test_settings_out_of_range_are_refused() -> None:
    for setting in (
        {"budget": 1.0},
        {"budget": 0.0},
        {"budget_weight": 0.0},
        {"entropy_weight": -1.0},
        {"scorer_learning_rate": 0.0},
    ):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            AtwuSettings(**setting)
