"""Laws of Eq. 7 and 9 as this project reads them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alter_core import AlterConfig, expert_weights, scalar_logits
from alter_core.evidence import NO_EVIDENCE

logit = st.one_of(
    st.floats(-30, 30, width=32), st.sampled_from([0.0, -0.0, NO_EVIDENCE, 1e3, 1e-6, -1e-6])
)
domain_logits = st.integers(1, 7).flatmap(
    lambda n: st.lists(st.lists(logit, min_size=n, max_size=n), min_size=3, max_size=3)
)
# Ties at the edge of the top k may be broken either way: keep the logits apart.
distinct_logits = st.integers(1, 7).flatmap(
    lambda n: st.lists(
        st.lists(st.integers(-40, 40).map(lambda i: i / 4), min_size=n, max_size=n, unique=True),
        min_size=3,
        max_size=3,
    )
)
paths = st.lists(st.booleans(), min_size=3, max_size=3)
top_ks = st.integers(1, 8)
temperatures = st.floats(0.05, 3.0)


def config(*, top_k: int = 3, temperature_high: float = 0.8) -> AlterConfig:
    return AlterConfig(tap_layer=0, top_k=top_k, temperature_high=temperature_high)


def weigh(logits: list[list[float]], is_high: list[bool], settings: AlterConfig) -> torch.Tensor:
    return expert_weights(torch.tensor(logits), torch.tensor(is_high), settings)


def naive_weights(
    logits: list[float], is_high: bool, *, top_k: int, temperature: float
) -> list[float]:
    """Eq. 7 and 9 for one token, in words: see the design's table."""
    num_domains = len(logits)
    weights = [0.0] * (1 + num_domains)
    if not is_high:
        best = 0
        for domain in range(num_domains):
            if logits[domain] > ([0.0, *logits])[best]:
                best = 1 + domain
        weights[best] = 1.0
        return weights
    weights[0] = 1.0
    scores = [0.0, *logits]
    top = max(scores)
    powers = [math.exp((score - top) / temperature) for score in scores]
    winners = [domain for domain in range(num_domains) if logits[domain] > 0]
    winners.sort(key=lambda domain: -logits[domain])
    for domain in winners[:top_k]:
        weights[1 + domain] = powers[1 + domain] / sum(powers)
    return weights


@given(distinct_logits, paths, top_ks, temperatures)
def test_weights_are_equations_7_and_9(
    logits: list[list[float]], is_high: list[bool], top_k: int, temperature: float
) -> None:
    weights = weigh(logits, is_high, config(top_k=top_k, temperature_high=temperature))
    assert weights.dtype is torch.float32
    for t in range(3):
        expected = naive_weights(logits[t], is_high[t], top_k=top_k, temperature=temperature)
        assert weights[t].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


@given(domain_logits, top_ks)
def test_low_entropy_path_is_one_hot(logits: list[list[float]], top_k: int) -> None:
    weights = weigh(logits, [False] * 3, config(top_k=top_k))
    assert (weights.sum(dim=-1) == 1).all()
    assert (weights.max(dim=-1).values == 1).all()


@given(domain_logits, paths, top_ks, temperatures)
def test_a_domain_that_does_not_beat_retain_gets_exactly_0(
    logits: list[list[float]], is_high: list[bool], top_k: int, temperature: float
) -> None:
    weights = weigh(logits, is_high, config(top_k=top_k, temperature_high=temperature))
    assert (weights[:, 1:][torch.tensor(logits) <= 0] == 0).all()


@given(domain_logits, paths)
def test_a_token_without_evidence_is_the_retain_expert_alone(
    logits: list[list[float]], is_high: list[bool]
) -> None:
    quiet = [[-abs(value) for value in row] for row in logits]
    weights = weigh(quiet, is_high, config())
    assert (weights[:, 0] == 1).all()
    assert (weights[:, 1:] == 0).all()


@given(domain_logits, top_ks, temperatures)
def test_high_entropy_path_always_has_the_whole_retain_expert(
    logits: list[list[float]], top_k: int, temperature: float
) -> None:
    weights = weigh(logits, [True] * 3, config(top_k=top_k, temperature_high=temperature))
    assert (weights[:, 0] == 1).all()


@given(domain_logits, paths, top_ks, temperatures)
def test_at_most_top_k_domains_are_combined_and_never_more_than_a_whole_one(
    logits: list[list[float]], is_high: list[bool], top_k: int, temperature: float
) -> None:
    weights = weigh(logits, is_high, config(top_k=top_k, temperature_high=temperature))
    assert ((weights[:, 1:] > 0).sum(dim=-1) <= top_k).all()
    assert (weights >= 0).all()
    assert (weights[:, 1:].sum(dim=-1) <= 1 + 1e-6).all()


@given(distinct_logits, paths, top_ks, st.randoms(use_true_random=False))
def test_the_order_of_the_domains_does_not_matter(
    logits: list[list[float]], is_high: list[bool], top_k: int, random: object
) -> None:
    order = list(range(len(logits[0])))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = [[row[domain] for domain in order] for row in logits]
    weights = weigh(logits, is_high, config(top_k=top_k))
    expected = weights[:, [0, *(1 + domain for domain in order)]]
    torch.testing.assert_close(weigh(shuffled, is_high, config(top_k=top_k)), expected)


@given(distinct_logits, paths, st.integers(1, 5))
def test_empty_slots_change_nothing(
    logits: list[list[float]], is_high: list[bool], num_empty: int
) -> None:
    """The serving engine always has columns for all of its slots."""
    padded = [[*row, *[NO_EVIDENCE] * num_empty] for row in logits]
    weights = weigh(padded, is_high, config(top_k=2))
    assert (weights[:, -num_empty:] == 0).all()
    torch.testing.assert_close(weights[:, :-num_empty], weigh(logits, is_high, config(top_k=2)))


@pytest.mark.parametrize("is_high", [True, False])
def test_without_any_domain_everything_is_retained(is_high: bool) -> None:
    weights = expert_weights(torch.empty(2, 3, 0), torch.full((2, 3), is_high), config())
    assert weights.tolist() == [[[1.0]] * 3] * 2


def test_each_token_takes_its_own_path() -> None:
    """Shapes (B=2, T=3, N=4): a path that is broadcast along the wrong axis would show."""
    logits = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)) * 3
    is_high = torch.tensor([[True, False, False], [False, True, True]])
    weights = expert_weights(logits, is_high, config(top_k=2))
    assert weights.shape == (2, 3, 5)
    for b in range(2):
        for t in range(3):
            expected = naive_weights(
                logits[b, t].tolist(), bool(is_high[b, t]), top_k=2, temperature=0.8
            )
            assert weights[b, t].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_bf16_logits_are_weighed_in_float32() -> None:
    logits = torch.tensor([[1.5, 0.5]]).bfloat16()
    weights = expert_weights(logits, torch.tensor([True]), config())
    torch.testing.assert_close(
        weights, expert_weights(logits.float(), torch.tensor([True]), config())
    )


def test_weights_leave_the_logits_alone() -> None:
    logits = torch.tensor([[1.5, 0.5, -1.0]])
    before = logits.clone()
    expert_weights(logits, torch.tensor([True]), config(top_k=1))
    assert torch.equal(logits, before)


@given(
    st.lists(st.integers(-20, 20).filter(bool), min_size=1, max_size=5, unique=True),
    st.lists(st.floats(0.0625, 12.0, width=32), min_size=2, max_size=9),
)
def test_the_scalar_router_sends_every_token_to_one_constant_expert(
    weight: list[int], entropies: list[float]
) -> None:
    """Why Eq. 7 cannot be taken literally: S_q >= 0 scales W_g, and scaling moves no argmax."""
    logits = scalar_logits(torch.tensor(entropies), torch.tensor(weight))
    assert logits.shape == (len(entropies), len(weight))
    weights = expert_weights(logits, torch.zeros(len(entropies), dtype=torch.bool), config())
    chosen = weights.argmax(dim=-1).unique().tolist()
    assert chosen == [0 if max(weight) < 0 else 1 + weight.index(max(weight))]
