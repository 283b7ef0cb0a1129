from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy  # type: ignore[import-untyped]

from alter_eval import metrics

LOSS = st.floats(0, 100)
ROWS = st.lists(st.tuples(LOSS, st.lists(LOSS, min_size=1, max_size=5)), min_size=1, max_size=7)
WORDS = st.lists(st.sampled_from("abc"), max_size=20)
law = settings(deadline=None, max_examples=60)


def test_truth_ratio_by_hand() -> None:
    correct = [-math.log(0.5), -math.log(0.2)]
    wrong = [[-math.log(0.1), -math.log(0.4)], [-math.log(0.2)]]
    assert metrics.truth_ratio(correct, wrong) == pytest.approx([0.2 / 0.5, 1.0])


@law
@given(ROWS)
def test_truth_ratio_is_the_geometric_mean_of_wrong_over_right(
    rows: list[tuple[float, list[float]]],
) -> None:
    found = metrics.truth_ratio([c for c, _ in rows], [w for _, w in rows])
    for ratio, (correct, wrong) in zip(found, rows, strict=True):
        mean_wrong = sum(wrong) / len(wrong)
        assert math.log(ratio) == pytest.approx(correct - mean_wrong, abs=1e-9)


def test_deeply_forgotten_answers_keep_their_truth_ratio() -> None:
    ratios = metrics.truth_ratio([60.0, 60.0], [[60.0, 60.0], [59.0, 59.0]])
    assert ratios == pytest.approx([1.0, math.e])


@law
@given(ROWS)
def test_truth_ratio_figures_lie_between_0_and_1(rows: list[tuple[float, list[float]]]) -> None:
    ratios = metrics.truth_ratio([c for c, _ in rows], [w for _, w in rows])
    assert 0 <= metrics.closer_to_one(ratios) <= 1
    assert 0 <= metrics.true_is_better(ratios) <= 1


@law
@given(st.lists(LOSS, min_size=1), st.integers(1, 5))
def test_equal_answers_are_as_close_to_one_as_can_be(losses: list[float], num_wrong: int) -> None:
    ratios = metrics.truth_ratio(losses, [[loss] * num_wrong for loss in losses])
    assert metrics.closer_to_one(ratios) == pytest.approx(1)
    assert metrics.true_is_better(ratios) == pytest.approx(0, abs=1e-9)


def test_a_truth_ratio_and_its_inverse_are_as_far_from_one() -> None:
    assert metrics.closer_to_one(np.array([0.25])) == metrics.closer_to_one(np.array([4.0])) == 0.25
    assert metrics.closer_to_one(np.array([0.0])) == 0


def test_true_is_better_by_hand() -> None:
    assert metrics.true_is_better(np.array([0.0, 0.5, 3.0])) == pytest.approx((1 + 0.5 + 0) / 3)


def test_normalised_probability_by_hand() -> None:
    found = metrics.normalised_probability(
        [-math.log(0.3)], [[-math.log(0.2), -math.log(0.1), -math.log(0.4)]]
    )
    assert found == pytest.approx([0.3])


@law
@given(st.lists(LOSS, min_size=2, max_size=6))
def test_normalised_probabilities_of_all_answers_sum_to_one(losses: list[float]) -> None:
    shares = [
        metrics.normalised_probability([loss], [losses[:place] + losses[place + 1 :]])[0]
        for place, loss in enumerate(losses)
    ]
    assert sum(shares) == pytest.approx(1)


def test_ks_p_value_tells_samples_apart() -> None:
    sample = list(np.linspace(0, 1, 40))
    assert metrics.ks_p_value(sample, sample) == 1
    assert metrics.ks_p_value(sample, [value + 2 for value in sample]) < 1e-12


@law
@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=9))
def test_harmonic_mean_lies_between_least_and_arithmetic_mean(parts: list[float]) -> None:
    found = metrics.harmonic_mean(parts)
    assert found == pytest.approx(len(parts) / sum(1 / part for part in parts))
    assert min(parts) - 1e-9 <= found <= np.mean(parts) + 1e-9


def test_harmonic_mean_is_0_where_a_part_is() -> None:
    assert metrics.harmonic_mean([0.9, 0.0, 0.8]) == 0


@given(st.lists(st.booleans(), min_size=1, max_size=30))
def test_extraction_strength_is_one_minus_the_shortest_sufficient_prefix(hits: list[bool]) -> None:
    shortest = next(k for k in range(len(hits) + 1) if all(hits[k:]))
    assert metrics.extraction_strength(hits) == pytest.approx(1 - shortest / len(hits))


@pytest.mark.parametrize(
    ("hits", "expected"),
    [([True] * 7, 1.0), ([True, True, False], 0.0), ([True, False, True, True], 0.5)],
)
def test_extraction_strength_by_hand(hits: list[bool], expected: float) -> None:
    assert metrics.extraction_strength(hits) == expected


def test_min_k_is_the_mean_of_the_least_likely_tokens() -> None:
    assert metrics.min_k([-1.0, -5.0, -0.5, -3.0, -2.0], 0.4) == pytest.approx(-4.0)
    assert metrics.min_k([-1.0, -2.0], 0.4) == -2.0, "at least one token"


@given(st.lists(st.floats(-50, 0), min_size=1, max_size=20), st.permutations(range(20)))
def test_min_k_is_blind_to_order_and_never_above_the_mean(
    logprobs: list[float], order: list[int]
) -> None:
    shuffled = [logprobs[place] for place in order if place < len(logprobs)]
    assert metrics.min_k(shuffled, 0.4) == metrics.min_k(logprobs, 0.4)
    assert metrics.min_k(logprobs, 0.4) <= np.mean(logprobs) + 1e-9
    assert metrics.min_k(logprobs, 1.0) == pytest.approx(np.mean(logprobs))


def test_membership_auc_of_equal_and_of_separated_scores() -> None:
    assert metrics.membership_auc([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]) == 0.5
    assert metrics.membership_auc([4.0, 5.0], [1.0, 2.0, 3.0]) == 1
    assert metrics.membership_auc([1.0], [2.0, 3.0]) == 0
    assert metrics.membership_auc([1.0, 3.0], [2.0, 3.0]) == pytest.approx((0 + 0 + 1 + 0.5) / 4)


@given(st.floats(0, 1))
def test_privleak_of_equal_aucs_is_0(auc: float) -> None:
    assert metrics.privleak(auc, auc) == 0


def test_privleak_by_hand() -> None:
    assert metrics.privleak(1.0, 0.5) == pytest.approx(-100), "still a member: under-unlearned"
    assert metrics.privleak(0.25, 0.5) == pytest.approx(50), (
        "less likely than unseen: over-unlearned"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0),
        ("no no", 0),
        ("no no no", 0),
        ("one two three four five", 0),
        ("a b c a b c a b c", 4 / 7),
        ("no no no no no no", 3 / 4),
    ],
)
def test_repetition_rate_by_hand(text: str, expected: float) -> None:
    assert metrics.repetition_rate(text.split()) == pytest.approx(expected)


@given(WORDS)
def test_repetition_rate_counts_what_occurred_before(words: list[str]) -> None:
    grams = [words[at : at + 3] for at in range(len(words) - 2)]
    seen = sum(gram in grams[:at] for at, gram in enumerate(grams))
    assert metrics.repetition_rate(words) == pytest.approx(seen / max(1, len(grams)))


def test_distinct_n_by_hand() -> None:
    assert metrics.distinct_n([["a", "b", "c"], ["a", "b"]]) == pytest.approx(2 / 3)
    assert metrics.distinct_n([["a", "a", "a"]], order=1) == pytest.approx(1 / 3)
    assert metrics.distinct_n([["a"], []]) == 0


@given(st.lists(WORDS, max_size=5))
def test_distinct_n_is_a_share(answers: list[list[str]]) -> None:
    assert 0 <= metrics.distinct_n(answers) <= 1


def lcs(first: list[str], second: list[str]) -> int:
    """Length of the longest common subsequence, by its recursion."""
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return 1 + lcs(first[:-1], second[:-1])
    return max(lcs(first[:-1], second), lcs(first, second[:-1]))


@law
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=7), WORDS.map(lambda w: w[:6]))
def test_rouge_l_is_the_longest_common_subsequence(words: list[str], found: list[str]) -> None:
    (score,) = metrics.rouge_l([" ".join(words)], [" ".join(found)])
    common = lcs(words, found)
    assert score.recall == pytest.approx(common / len(words))
    assert score.f1 == pytest.approx(2 * common / (len(words) + len(found)))


def test_rouge_l_takes_stems_only_where_asked() -> None:
    (with_stems,) = metrics.rouge_l(["two mills turning"], ["two mill turns"])
    (without,) = metrics.rouge_l(["two mills turning"], ["two mill turns"], use_stemmer=False)
    assert (with_stems.recall, without.recall) == (1.0, pytest.approx(1 / 3))


def test_bleu_by_hand() -> None:
    pytest.importorskip("sacrebleu", reason="needs the extra `eval`")
    found = metrics.bleu(
        ["a b c d e", "a b c d e", "a b c d e f", "a b"],
        ["a b c d e", "a b c d", "a b c x d e f", "a b"],
    )
    # Precisions of 1- to 4-grams; the third has no 4-gram right, smoothed to half a hit.
    third = (6 / 7 * 4 / 6 * 2 / 5 * 0.5 / 4) ** 0.25
    assert found == pytest.approx([1.0, math.exp(1 - 5 / 4), third, 1.0])


def test_the_similarity_gap_is_between_means_of_each_similarity() -> None:
    # BLEU up by 0.2, ROUGE-L down by 0.1: gaps add up, and do not cancel.
    found = [[0.1, 0.5, 0.6], [0.2, 0.2, 0.2]]
    retrained = [[0.0, 0.2, 0.4], [0.5, 0.2, 0.2]]
    assert metrics.average_similarity_gap(found, retrained) == pytest.approx((0.2 + 0.1) / 2)
    assert metrics.average_similarity_gap(found, found) == 0


@given(WORDS)
def test_ngram_entropy_is_the_weighted_entropy_of_pairs_and_triples(words: list[str]) -> None:
    expected = []
    for order, weight in ((2, 2 / 3), (3, 4 / 3)):
        grams = ["".join(words[at : at + order]) for at in range(len(words) - order + 1)]
        counts = [grams.count(gram) for gram in set(grams)]
        expected.append(weight * (float(entropy(counts, base=2)) if counts else 0.0))
    assert metrics.ngram_entropy(words) == pytest.approx(sum(expected) / 2)
