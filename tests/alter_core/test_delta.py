"""The multi-expert delta against a loop over tokens and experts in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from alter_core import multi_expert_delta

B, T, D, R, E, O = 2, 3, 5, 7, 4, 11  # noqa: E741 - the legend's letter


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(seed: int = 0, num_tokens: int = B * T) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = random(num_tokens, D, seed=seed)
    weights = random(num_tokens, E, seed=seed + 3).relu()
    return x, random(R, D, seed=seed + 1), random(E, O, R, seed=seed + 2), weights


def naive_delta(x: Tensor, a: Tensor, b: Tensor, weights: Tensor, scaling: float) -> Tensor:
    out = torch.zeros(x.shape[0], b.shape[1], dtype=torch.float64)
    for t in range(x.shape[0]):
        for e in range(b.shape[0]):
            for o in range(b.shape[1]):
                for r in range(a.shape[0]):
                    inner = sum(float(a[r, i]) * float(x[t, i]) for i in range(x.shape[1]))
                    out[t, o] += float(weights[t, e]) * float(b[e, o, r]) * inner
    return out * scaling


def test_delta_is_the_weighted_sum_over_experts() -> None:
    actual = multi_expert_delta(*inputs(), 1.75)
    assert actual.shape == (B * T, O)
    torch.testing.assert_close(actual.double(), naive_delta(*inputs(), 1.75), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_zero_weights_give_exactly_zero(dtype: torch.dtype) -> None:
    x, a, b, weights = (t.to(dtype) for t in inputs())
    delta = multi_expert_delta(x, a, b, torch.zeros_like(weights), 2.0)
    assert (delta == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_of_weight_zero_is_untouched_beside_others(dtype: torch.dtype) -> None:
    x, a, b, weights = (t.to(dtype) for t in inputs())
    weights[2] = 0
    delta = multi_expert_delta(x, a, b, weights, 2.0)
    assert (delta[2] == 0).all()
    assert (delta[[0, 1, 3, 4, 5]] != 0).any(dim=-1).all()


def test_delta_keeps_the_dtype_of_x_though_weights_are_float32() -> None:
    x, a, b, weights = inputs()
    delta = multi_expert_delta(x.bfloat16(), a.bfloat16(), b.bfloat16(), weights, 2.0)
    assert delta.dtype is torch.bfloat16
    torch.testing.assert_close(
        delta.double(), naive_delta(x, a, b, weights, 2.0), rtol=0.05, atol=0.5
    )


@given(st.integers(0, 2**16), st.floats(-3, 3), st.floats(-3, 3))
def test_delta_is_linear_in_the_weights(seed: int, first: float, second: float) -> None:
    x, a, b, weights = inputs(seed)
    other = random(B * T, E, seed=seed + 9)
    mixed = multi_expert_delta(x, a, b, first * weights + second * other, 2.0)
    apart = first * multi_expert_delta(x, a, b, weights, 2.0) + second * multi_expert_delta(
        x, a, b, other, 2.0
    )
    torch.testing.assert_close(mixed, apart, rtol=1e-3, atol=1e-3)


@given(st.integers(0, 2**16))
def test_delta_of_a_token_does_not_depend_on_the_others(seed: int) -> None:
    x, a, b, weights = inputs(seed)
    whole = multi_expert_delta(x, a, b, weights, 2.0)
    alone = multi_expert_delta(x[3:4], a, b, weights[3:4], 2.0)
    torch.testing.assert_close(whole[3:4], alone, rtol=1e-4, atol=1e-4)


def test_delta_of_no_tokens_is_empty() -> None:
    assert multi_expert_delta(*inputs(num_tokens=0), 2.0).shape == (0, O)


def test_gradient_reaches_only_the_experts_in_use() -> None:
    x, a, b, weights = inputs()
    weights[:, 1] = 0
    b.requires_grad_()
    multi_expert_delta(x, a, b, weights, 2.0).square().sum().backward()
    assert b.grad is not None
    assert (b.grad[1] == 0).all()
    assert (b.grad[[0, 2, 3]] != 0).any(dim=-1).any(dim=-1).all()
