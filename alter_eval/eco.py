"""ECO, which serves beside ALTER: embedding-corrupted prompts (Liu et al. 2024, arXiv 2406.07933).

No weight changes. A classifier of prompts flags those that ask for the domain, and noise is added to some
dimensions of a flagged prompt's embeddings, in prefill alone; its strength is searched for by two-point
finite differences, until answers are as unlikely as a model that never learned the domain finds them.

The paper's classifier is a fine-tuned RoBERTa; ours, which needs no second model, is a logistic regression on
n-grams of token ids.

Legend: B rows, T tokens, D embedding size, K corrupted dimensions, N prompts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]
from sklearn.model_selection import (  # type: ignore[import-untyped]
    StratifiedKFold,
    cross_val_predict,
)
from sklearn.pipeline import Pipeline, make_pipeline  # type: ignore[import-untyped]
from torch import Tensor, nn

from alter_core.errors import ConfigError
from trainer.base_model import BaseModel
from trainer.dataset import EncodedRow

from .models import AnswerScores, TransformersModel

Prompt = Sequence[int]
"""Token ids up to the first answer token."""
_MAX_NGRAM = 3
_FOLDS = 5
_STEP = 0.1
"""Half the distance of the two points, as a share of the strength."""
_MOST_CHANGE = 2.0
"""Factor by which the strength changes in one step, at most."""


class PromptClassifier:
    """Which prompts ask for the domain."""

    def __init__(
        self,
        forget: Sequence[Prompt],
        retain: Sequence[Prompt],
        *,
        false_alarms: float = 0.001,
    ) -> None:
        """Fits and calibrates: at most that share of retained prompts, each judged by a classifier that was
        not shown it, lies above the threshold.

        Raises: ConfigError if there are too few prompts to calibrate on, or on a share outside [0, 1).
        """
        if min(len(forget), len(retain)) < _FOLDS:
            raise ConfigError(
                "There are too few prompts to calibrate a classifier on",
                expected=f"{_FOLDS} of each kind",
                got=f"{len(forget)} to forget, {len(retain)} to retain",
            )
        if not 0 <= false_alarms < 1:
            raise ConfigError(
                "false_alarms is out of range", expected="in [0, 1)", got=str(false_alarms)
            )
        prompts = [*forget, *retain]
        is_forgotten = np.repeat([True, False], [len(forget), len(retain)])
        # Prompts come sorted by where they are from: a fold must not hold all of one kind.
        folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
        unseen = cross_val_predict(
            _pipeline(), prompts, is_forgotten, cv=folds, method="decision_function"
        )
        self.threshold = float(
            np.quantile(unseen[~is_forgotten], 1 - false_alarms, method="higher")
        )
        self._classifier = _pipeline().fit(prompts, is_forgotten)

    def __call__(self, prompts: Sequence[Prompt]) -> NDArray[np.bool_]:
        """Whether each prompt is flagged. Shape: (N,)."""
        if not prompts:
            return np.zeros(0, dtype=np.bool_)
        flagged: NDArray[np.bool_] = (
            self._classifier.decision_function(list(prompts)) > self.threshold
        )
        return flagged


class EcoModel(TransformersModel):
    """A base model whose flagged prompts are corrupted."""

    def __init__(
        self,
        base: BaseModel,
        classifier: Callable[[Sequence[Prompt]], NDArray[np.bool_]],
        *,
        strength: float,
        num_dims: int = 1,
        seed: int = 0,
    ) -> None:
        """Normal noise with a standard deviation of `strength` goes to the first `num_dims` dimensions.

        Raises: ConfigError if the embeddings have fewer.
        """
        super().__init__(base)
        size = base.model.get_input_embeddings().weight.shape[1]
        if not 0 < num_dims <= size:
            raise ConfigError(
                "num_dims is out of range", expected=f"1 to {size}", got=str(num_dims)
            )
        self.classifier, self.strength = classifier, strength
        self.num_dims, self.seed = num_dims, seed

    def score(self, rows: Sequence[EncodedRow]) -> list[AnswerScores]:
        """See LanguageModel."""
        with self._corrupted([row.ids[: row.num_prompt] for row in rows]):
            return super().score(rows)

    def complete(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> list[list[int]]:
        """See LanguageModel."""
        with self._corrupted(prompts):
            return super().complete(prompts, max_new_tokens=max_new_tokens)

    @contextlib.contextmanager
    def _corrupted(self, prompts: Sequence[Prompt]) -> Iterator[None]:
        """Inside the block, flagged ones of these prompts are corrupted wherever a batch holds them."""
        is_flagged = self.classifier(prompts)
        noise = {
            tuple(prompt): prompt_noise(
                prompt, strength=self.strength, num_dims=self.num_dims, seed=self.seed
            )
            for prompt, flagged in zip(prompts, is_flagged, strict=True)
            if flagged
        }
        embeddings: nn.Module = self.base.model.get_input_embeddings()
        handle = embeddings.register_forward_hook(_Corruption(noise))
        try:
            yield
        finally:
            handle.remove()


def prompt_noise(prompt: Prompt, *, strength: float, num_dims: int = 1, seed: int = 0) -> Tensor:
    """Normal noise, the same for the same prompt, whatever it is asked beside. Shape: (T, K), float32."""
    digest = hashlib.sha256(f"{seed}/{tuple(prompt)}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return strength * torch.randn(len(prompt), num_dims, generator=generator)


class _Corruption:
    """Adds each prompt's noise where it stands: at the start of a row that is scored, or, padded on the left,
    at the end of one that is to be continued."""

    def __init__(self, noise: dict[tuple[int, ...], Tensor]) -> None:
        self.noise = noise
        self.lengths = sorted({len(prompt) for prompt in noise}, reverse=True)

    def __call__(self, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        result = output.clone()
        for row, ids in enumerate(args[0].tolist()):
            if (start := self._start(ids)) is not None:
                noise_TK = self.noise[tuple(ids[slice(*start)])].to(output)
                result[row, slice(*start), : noise_TK.shape[1]] += noise_TK
        return result

    def _start(self, ids: list[int]) -> tuple[int, int] | None:
        """Start and stop of the flagged prompt in a row."""
        for length in self.lengths:
            for start in (0, len(ids) - length):
                if start >= 0 and tuple(ids[start : start + length]) in self.noise:
                    return start, start + length
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """How a strength was found."""

    strength: float
    distance: float
    """Of what the model does under it from the target."""
    num_evaluations: int


def search_strength(
    distance: Callable[[float], float],
    *,
    strength: float,
    learning_rate: float = 1.0,
    num_steps: int = 20,
    tolerance: float = 0.05,
) -> Search:
    """Zeroth-order search, as in the paper: two evaluations a step, no gradient of the model.

    log s <- log s - eta (d(s + h) - d(s - h)) / (log(s + h) - log(s - h)): the scale of embeddings, which
    models differ in, takes no part. Unlike the paper's, eta and h are halved where the slope changes sign.
    Ends within `tolerance`; the best point seen is returned.

    Raises: ConfigError unless the strength that it starts with is positive.
    """
    if strength <= 0:
        raise ConfigError("strength is out of range", expected="> 0", got=str(strength))
    best, num_evaluations = (math.inf, strength), 0
    share, before = _STEP, 0.0
    for _ in range(num_steps):
        points = strength * (1 - share), strength * (1 + share)
        found = [distance(point) for point in points]
        num_evaluations += len(points)
        best = min(best, *zip(found, points, strict=True))
        if best[0] <= tolerance:
            break
        slope = (found[1] - found[0]) / (math.log(points[1]) - math.log(points[0]))
        if slope * before < 0:
            learning_rate, share = learning_rate / 2, share / 2
        before, limit = slope, math.log(_MOST_CHANGE)
        strength *= math.exp(min(max(-learning_rate * slope, -limit), limit))
    return Search(strength=best[1], distance=best[0], num_evaluations=num_evaluations)


def _pipeline() -> Pipeline:
    return make_pipeline(
        TfidfVectorizer(analyzer=_ngrams, sublinear_tf=True),
        LogisticRegression(C=100.0, class_weight="balanced", max_iter=1000),
    )


def _ngrams(prompt: Prompt) -> list[tuple[int, ...]]:
    ids = tuple(prompt)
    return [
        ids[start : start + length]
        for length in range(1, _MAX_NGRAM + 1)
        for start in range(len(ids) - length + 1)
    ]
