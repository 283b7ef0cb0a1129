"""Unlearning metrics under their standard names, on plain numbers.

Definitions: TOFU (arXiv 2401.06121), MUSE (arXiv 2407.06460) and OpenUnlearning (arXiv 2506.12618), whose
conventions are followed where the papers leave room; RWKU (arXiv 2406.10890), ECO (arXiv 2406.07933).

Legend: N rows, P perturbed answers of a row, T answer tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax  # type: ignore[import-untyped]
from scipy.stats import hmean, ks_2samp  # type: ignore[import-untyped]
from sklearn.metrics import roc_auc_score  # type: ignore[import-untyped]

from alter_core.errors import ConfigError

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


class RougeL(NamedTuple):
    """ROUGE-L of one text against its reference, in [0, 1]."""

    recall: float
    f1: float


def rouge_l(
    references: Sequence[str], found: Sequence[str], *, use_stemmer: bool = True
) -> list[RougeL]:
    """ROUGE-L (Lin 2004) of each text, from the longest common subsequence of words."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=use_stemmer)
    scores = [
        scorer.score(reference, text)["rougeL"]
        for reference, text in zip(references, found, strict=True)
    ]
    return [RougeL(recall=score.recall, f1=score.fmeasure) for score in scores]


def bleu(references: Sequence[str], found: Sequence[str]) -> list[float]:
    """Sentence BLEU (Papineni et al. 2002) of each text, in [0, 1], by sacreBLEU (Post 2018).

    Orders that a short text has no n-grams of are left out. Raises: ConfigError without the extra `eval`.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ModuleNotFoundError:
        raise needs_extra("sacrebleu") from None
    scorer = BLEU(effective_order=True)
    return [
        scorer.sentence_score(text, [reference]).score / 100
        for reference, text in zip(references, found, strict=True)
    ]


def average_similarity_gap(
    found: Sequence[Sequence[float]], retrained: Sequence[Sequence[float]]
) -> float:
    """ASG = (1/M) sum_m |mean s_m(model) - mean s_m(retrained)|, in [0, 1]; 0 is ideal.

    s_m(f) are the M similarities, BLEU and ROUGE-L for us, between what f says to each forgotten prefix and
    how the text goes on. The ALTER paper names ASG as its target and defines it nowhere; the term is ECO's:
    a gap to the model that never saw the text. ECO averages four similarities, so its figures are others.
    Shapes: (M, N), (M, N) -> ().
    """
    return fmean(abs(fmean(a) - fmean(b)) for a, b in zip(found, retrained, strict=True))


def ngram_entropy(words: Sequence[str]) -> float:
    """RWKU's fluency: mean of 2/3 H_2 and 4/3 H_3, H_n the entropy of a text's n-grams in bits.

    0 of a text with no n-grams, or one that repeats itself for ever.
    """
    return fmean((2 / 3 * _entropy(words, 2), 4 / 3 * _entropy(words, 3)))


def _entropy(words: Sequence[str], order: int) -> float:
    counts = Counter(tuple(words[at : at + order]) for at in range(len(words) - order + 1))
    total = counts.total()
    return sum(count / total * math.log2(total / count) for count in counts.values())


def needs_extra(package: str) -> ConfigError:
    """The error of a package that is not installed."""
    return ConfigError(
        f"This needs {package}, which is not installed",
        expected="the extra `eval`",
        got="an installation without it",
        fix="Install it: ALTER_EXTRAS=eval scripts/setup.sh, or pip install '.[eval]' in the project.",
    )
