"""Laws of the entropies, against Eq. 3 and 5 written down literally in high-precision decimals."""

from __future__ import annotations

import decimal
import itertools
import math
from decimal import Decimal

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from alter_core import EntropyEstimator, max_tsallis_entropy, shannon_entropy, tsallis_entropy

logit = st.floats(-40, 40, width=32)
logit_lists = st.lists(logit, min_size=2, max_size=11)
orders = st.one_of(
    st.floats(0.05, 4.0),
    st.builds(
        lambda sign, exponent: 1 + sign * 10.0**-exponent,
        st.sampled_from([-1, 1]),
        st.floats(1, 14),
    ),
    st.just(1.0),
)


def reference_entropy(logits: list[float], q: float) -> float:
    """Eq. 5, and Eq. 3 at q = 1, with 60 digits. -inf has probability 0."""
    with decimal.localcontext(prec=60):
        top = max(logits)
        powers = [
            Decimal(0) if v == -math.inf else (Decimal(v) - Decimal(top)).exp() for v in logits
        ]
        p = [power / sum(powers) for power in powers if power]
        if q == 1:
            return float(-sum((p_i * p_i.ln() for p_i in p), Decimal(0)))
        total = sum((p_i ** Decimal(q) for p_i in p), Decimal(0))
        return float((1 - total) / (Decimal(q) - 1))


@given(logit_lists, orders)
@example([0.0, 0.0], 1 + 9e-5)
@example([5.0, 5.0, 5.0, 5.0, 5.0], 1 - 9e-5)
@example([30.0, 0.0, 0.0], 0.999)
def test_tsallis_entropy_is_equation_5(logits: list[float], q: float) -> None:
    actual = tsallis_entropy(torch.tensor(logits), q).item()
    assert actual == pytest.approx(reference_entropy(logits, q), rel=3e-5, abs=3e-6)


@given(logit_lists)
def test_shannon_entropy_is_equation_3(logits: list[float]) -> None:
    actual = shannon_entropy(torch.tensor(logits)).item()
    assert actual == pytest.approx(reference_entropy(logits, 1), rel=3e-5, abs=3e-6)


@given(logit_lists, orders)
def test_entropy_is_never_negative(logits: list[float], q: float) -> None:
    assert tsallis_entropy(torch.tensor(logits), q).item() >= 0


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("distance", [1e-3, 1e-4, 1e-5, 1e-6, 1e-9, 1e-12])
def test_tsallis_entropy_tends_to_shannon_as_q_tends_to_1(side: int, distance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 4000, generator=generator) * 3
    shannon = shannon_entropy(logits)
    # The first term left out of the limit is (q - 1) / 2 * E[log^2 p], at most 40 here.
    torch.testing.assert_close(
        tsallis_entropy(logits, 1 + side * distance), shannon, rtol=1e-5, atol=40 * distance
    )


def test_tsallis_entropy_falls_with_q_also_next_to_1() -> None:
    """A seam between the limit and the formula would break the order."""
    logits = torch.zeros(4096)
    orders = [1 + step * 3e-5 for step in range(-9, 10)]
    entropies = [tsallis_entropy(logits, q).item() for q in orders]
    steps = [before - after for before, after in itertools.pairwise(entropies)]
    assert min(steps) > 0
    assert max(steps) < 1.2 * min(steps)


@given(logit_lists, orders)
def test_uniform_distribution_is_maximal(logits: list[float], q: float) -> None:
    bound = max_tsallis_entropy(q, len(logits))
    assert tsallis_entropy(torch.tensor(logits), q).item() <= bound * (1 + 1e-5) + 1e-6
    assert tsallis_entropy(torch.full((len(logits),), 2.5), q).item() == pytest.approx(
        bound, rel=1e-5
    )


@given(logit_lists, orders, st.randoms(use_true_random=False))
def test_entropy_does_not_depend_on_the_order_of_the_vocabulary(
    logits: list[float], q: float, random: object
) -> None:
    shuffled = list(logits)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    torch.testing.assert_close(
        tsallis_entropy(torch.tensor(logits), q),
        tsallis_entropy(torch.tensor(shuffled), q),
        rtol=1e-5,
        atol=1e-6,
    )


@given(logit_lists, orders, st.floats(-100, 100, width=32))
def test_entropy_does_not_depend_on_a_constant_added_to_all_logits(
    logits: list[float], q: float, shift: float
) -> None:
    rounded = [round(value * 16) / 16 for value in logits]
    shift = round(shift * 16) / 16
    torch.testing.assert_close(
        tsallis_entropy(torch.tensor(rounded), q),
        tsallis_entropy(torch.tensor(rounded) + shift, q),
        rtol=1e-4,
        atol=1e-5,
    )


@given(logit_lists, st.floats(1.001, 6.0))
def test_entropy_stays_below_1_over_q_minus_1(logits: list[float], q: float) -> None:
    assert tsallis_entropy(torch.tensor(logits), q).item() < 1 / (q - 1)


@pytest.mark.parametrize("q", [0.3, 0.9999, 1.0, 1.00001, 1.5, 3.0])
def test_an_impossible_token_changes_nothing(q: float) -> None:
    logits = [0.5, -1.0, 2.0]
    with_impossible = torch.tensor([*logits, -math.inf, -math.inf], requires_grad=True)
    entropy = tsallis_entropy(with_impossible, q)
    assert entropy.item() == pytest.approx(reference_entropy(logits, q), rel=1e-5)
    (gradient,) = torch.autograd.grad(entropy, with_impossible)
    assert gradient.isfinite().all()


def test_an_impossible_token_changes_nothing_for_shannon() -> None:
    logits = [0.5, -1.0, 2.0]
    actual = shannon_entropy(torch.tensor([*logits, -math.inf])).item()
    assert actual == pytest.approx(reference_entropy(logits, 1), rel=1e-5)


@pytest.mark.parametrize("q", [0.3, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("scale", [1e4, 1e30, 3e38])
def test_huge_logits_neither_overflow_nor_become_nan(q: float, scale: float) -> None:
    certain = tsallis_entropy(torch.tensor([scale, -scale, 0.0]), q)
    assert certain.item() == pytest.approx(0, abs=1e-6)
    tied = tsallis_entropy(torch.tensor([scale, -scale, scale, scale]), q)
    assert tied.item() == pytest.approx(max_tsallis_entropy(q, 3), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("q", [1.0, 1.5])
def test_any_input_dtype_is_computed_in_float32(dtype: torch.dtype, q: float) -> None:
    logits = (torch.arange(77.0).sin() * 6).to(dtype)
    entropy = tsallis_entropy(logits, q)
    assert entropy.dtype is torch.float32
    assert entropy.item() == pytest.approx(reference_entropy(logits.tolist(), q), rel=1e-5)


def test_the_last_dimension_is_the_vocabulary() -> None:
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    entropies = tsallis_entropy(logits, 1.5)
    assert entropies.shape == (2, 3)
    for b in range(2):
        for t in range(3):
            expected = reference_entropy(logits[b, t].tolist(), 1.5)
            assert entropies[b, t].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("q", [0.0, -1.0])
def test_an_order_that_is_not_positive_is_refused(q: float) -> None:
    with pytest.raises(ValueError, match="tsallis_q must be > 0"):
        tsallis_entropy(torch.zeros(3), q)


@given(orders, st.integers(2, 200_000))
def test_max_tsallis_entropy_is_that_of_the_uniform_distribution(q: float, vocab_size: int) -> None:
    with decimal.localcontext(prec=60):
        if q == 1:
            expected = float(Decimal(vocab_size).ln())
        else:
            power = Decimal(vocab_size) ** (1 - Decimal(q))
            expected = float((1 - power) / (Decimal(q) - 1))
    assert max_tsallis_entropy(q, vocab_size) == pytest.approx(expected, rel=1e-9)


@given(orders)
def test_max_tsallis_entropy_of_an_unbounded_vocabulary(q: float) -> None:
    assume(q != 1)
    expected = 1 / (q - 1) if q > 1 else math.inf
    assert max_tsallis_entropy(q) == pytest.approx(expected, rel=1e-12)
    assert max_tsallis_entropy(1.0) == math.inf


def test_the_paper_threshold_is_out_of_reach_from_q_11_sixths_on() -> None:
    assert max_tsallis_entropy(1.833) > 1.2 > max_tsallis_entropy(1.834)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimator_gives_one_non_negative_float32_per_token(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    estimator = EntropyEstimator(5, num_units=7)
    entropy = estimator(torch.randn(shape).to(dtype))
    assert entropy.shape == shape[:-1]
    assert entropy.dtype is torch.float32
    assert (entropy >= 0).all()


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e15])
def test_estimator_is_finite_for_any_size_of_hidden_state(scale: float) -> None:
    torch.manual_seed(0)
    assert EntropyEstimator(5)(torch.randn(2, 3, 5) * scale).isfinite().all()


def test_estimator_is_its_formula() -> None:
    torch.manual_seed(0)
    estimator = EntropyEstimator(5, num_units=7)
    h = torch.randn(5)
    rms = math.sqrt(sum(v * v for v in h.tolist()) / 5)
    units = [
        max(0.0, sum(w * v / rms for w, v in zip(row, h.tolist(), strict=True)) + bias)
        for row, bias in zip(
            estimator.fc1.weight.tolist(), estimator.fc1.bias.tolist(), strict=True
        )
    ]
    out = sum(w * u for w, u in zip(estimator.fc2.weight[0].tolist(), units, strict=True))
    expected = math.log1p(math.exp(out + estimator.fc2.bias.item()))
    assert estimator(h).item() == pytest.approx(expected, rel=1e-4)
