"""Unlearning metrics under their standard names, on plain numbers.

Definitions: TOFU (arXiv 2401.06121), MUSE (arXiv 2407.06460) and OpenUnlearning (arXiv 2506.12618), whose
conventions are followed where the papers leave room.

Legend: N rows, P perturbed answers of a row, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax  # type: ignore[import-untyped]
from scipy.stats import hmean, ks_2samp  # type: ignore[import-untyped]
from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

Values = NDArray[np.float64]

_TINY = 1e-10


def truth_ratio(correct_nll: Sequence[float], wrong_nll: Sequence[Sequence[float]]) -> Values:
    """Geometric mean probability of the wrong answers over that of the correct one, per row.

    Both per token, from mean negative log-likelihoods in nats. Shapes: (N,), (N, P) -> (N,).
    From the difference of the logarithms: OpenUnlearning adds 1e-10 to the denominator, which would make the
    ratio of a deeply forgotten row 0 whatever its answers are.
    """
    ratio: Values = np.exp(
        np.asarray(correct_nll) - np.array([np.mean(values) for values in wrong_nll])
    )
    return ratio


def closer_to_one(ratios: Values) -> float:
    """Truth_Ratio of forgotten rows: mean of min(R, 1 / R), in [0, 1]; 1: wrong is as likely as right."""
    return float(np.minimum(ratios, 1 / np.maximum(ratios, _TINY)).mean())


def true_is_better(ratios: Values) -> float:
    """Truth_Ratio of kept rows: mean of max(0, 1 - R), in [0, 1]."""
    return float(np.maximum(0, 1 - ratios).mean())


def normalised_probability(
    correct_nll: Sequence[float], wrong_nll: Sequence[Sequence[float]]
) -> Values:
    """Probability of the correct answer among it and the wrong ones, each per token. Shapes: -> (N,)."""
    return np.array(
        [
            softmax(-np.array([correct, *wrong]))[0]
            for correct, wrong in zip(correct_nll, wrong_nll, strict=True)
        ]
    )


def ks_p_value(found: Sequence[float] | Values, reference: Sequence[float] | Values) -> float:
    """p-value of the two-sample Kolmogorov-Smirnov test. On truth ratios this is TOFU's forget_quality."""
    return float(ks_2samp(found, reference).pvalue)


def harmonic_mean(values: Sequence[float]) -> float:
    """TOFU's model_utility, given its nine parts; 0 if any of them is."""
    return float(hmean(np.maximum(values, 0)))


def extraction_strength(is_argmax: Sequence[bool]) -> float:
    """1 - k / T, k the shortest prefix after which teacher forcing predicts every remaining token."""
    num_tail = 0
    for hit in reversed(is_argmax):
        if not hit:
            break
        num_tail += 1
    return num_tail / len(is_argmax)


def min_k(logprobs: Sequence[float], share: float) -> float:
    """Min-K%: mean log probability of the `share` least likely tokens."""
    ordered = np.sort(np.asarray(logprobs))
    return float(ordered[: max(1, int(share * len(ordered)))].mean())


def membership_auc(members: Sequence[float], others: Sequence[float]) -> float:
    """AUC of a membership score: probability that a member scores above a row that was never seen."""
    labels = [1] * len(members) + [0] * len(others)
    return float(roc_auc_score(labels, [*members, *others]))


def privleak(auc: float, reference_auc: float) -> float:
    """MUSE's PrivLeak in percent: relative difference of 1 - AUC to the retrained model's; 0 is ideal."""
    return ((1 - auc) - (1 - reference_auc)) / (1 - reference_auc + _TINY) * 100


def repetition_rate(words: Sequence[str], order: int = 3) -> float:
    """Share of an answer's word n-grams that occurred in it before, in [0, 1]; 0 of short answers."""
    grams = [tuple(words[at : at + order]) for at in range(len(words) - order + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct_n(answers: Sequence[Sequence[str]], order: int = 2) -> float:
    """Different word n-grams of all answers over their number (Li et al. 2016)."""
    grams = [
        tuple(words[at : at + order]) for words in answers for at in range(len(words) - order + 1)
    ]
    return len(set(grams)) / len(grams) if grams else 0.0
