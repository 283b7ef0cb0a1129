"""Which tokens of forgotten answers count, and how much: weights for methods with a loss of single tokens.

    uniform           every answer token
    entropy           tokens that the base model is sure about, as in ALTER
    atwu              learned beside the model: what can be forgotten without harm to retained rows
    knowledge_spans   words that TOFU's perturbed answers exchange

Legend: B batch, T tokens, D hidden, N answer tokens of a batch.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from alter_core.errors import ConfigError, TrainingDataError
from trainer.atwu import AtwuSettings, TokenScorer
from trainer.batches import IGNORED, Batch
from trainer.entropy_pass import run_entropy_pass
from trainer.experts import select_answer_tokens
from trainer.settings import ExpertSettings

from .fields import TEXT, check_positive, check_range
from .spans import knowledge_tokens

if TYPE_CHECKING:
    from .base import Task

TokenWeights = Callable[[Batch, Tensor, Tensor], Tensor]
"""Weights of a batch's tokens, 0 where `labels` holds none. May learn from the losses it is shown.

Shapes: batch (B, T), last hidden states (B, T, D), token losses (B, T) -> (B, T).
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weighting(abc.ABC):
    """How tokens are weighted."""

    needs_retain: ClassVar[bool] = False
    """Whether it has a meaning only beside a loss on retained rows."""

    @abc.abstractmethod
    def start(self, task: Task) -> TokenWeights:
        """Prepares the weights for a task's forgotten rows, before anything is trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UniformWeighting(Weighting):
    """1 for every answer token."""

    def start(self, task: Task) -> TokenWeights:
        """See Weighting."""
        return lambda batch, hidden, losses: (batch.labels != IGNORED).float()


@dataclasses.dataclass(frozen=True, kw_only=True)
class EntropyWeighting(Weighting):
    """1 for answer tokens with S_q(x_t) <= `threshold` under the frozen base model, else 0.

    S_q(x_t) is the Tsallis entropy of the base model's distribution after reading x_t. Source: ALTER (arXiv
    2603.01792), Eq. 5 and Observation II.

    Raises: TrainingError if no token is selected.
    """

    threshold: float = 1.2
    """>= 0."""
    tsallis_q: float = 1.5
    """q of S_q, > 0."""

    def __post_init__(self) -> None:
        check_range(self, "threshold", self.threshold >= 0, ">= 0")
        check_positive(self, "tsallis_q")

    def start(self, task: Task) -> TokenWeights:
        """See Weighting."""
        # Nothing is trained yet, so the trained model still is the base model.
        entropy = run_entropy_pass(
            task.model, task.forget, tsallis_q=self.tsallis_q, tap_layer=0
        ).entropy
        selected = select_answer_tokens(task.forget, entropy, self.threshold, ExpertSettings())
        return _fixed(selected)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KnowledgeSpanWeighting(Weighting):
    """1 for answer tokens that hold the knowledge, as TOFU's perturbed answers show it, else 0.

    See `spans.knowledge_words`. A row in which they show none is forgotten as a whole. The texts come with
    evaluation data, so they are given here, one entry a forgotten row.

    Raises: ConfigError if there are more or fewer entries than rows, TrainingDataError if no row has a span.
    """

    perturbed_answers: Sequence[Sequence[str]] = dataclasses.field(metadata=TEXT)
    paraphrased_answers: Sequence[str] | None = dataclasses.field(default=None, metadata=TEXT)
    """What the perturbed answers were made from, where that is not the answer itself."""

    def start(self, task: Task) -> TokenWeights:
        """See Weighting."""
        paraphrased = self.paraphrased_answers or [None] * len(self.perturbed_answers)
        if not len(self.perturbed_answers) == len(paraphrased) == len(task.forget):
            raise ConfigError(
                "Perturbed answers do not fit the forgotten rows",
                expected=f"an entry for each of {len(task.forget)} rows",
                got=f"{len(self.perturbed_answers)} perturbed, {len(paraphrased)} paraphrased",
            )
        spans = [
            knowledge_tokens(task.model.tokenizer, row, perturbed, paraphrase)
            for row, perturbed, paraphrase in zip(
                task.forget, self.perturbed_answers, paraphrased, strict=True
            )
        ]
        if not any(bool(span.any()) for span in spans):
            raise TrainingDataError(
                "The perturbed answers show no knowledge in the forgotten rows",
                expected="words of answers that perturbed answers exchange",
                got="none",
                fix="Check that they belong to these rows, in the same order.",
            )
        return _fixed(
            [
                span if span.any() else torch.tensor(row.is_answer)
                for span, row in zip(spans, task.forget, strict=True)
            ]
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AtwuWeighting(AtwuSettings, Weighting):
    """Weights learned beside the model (see `trainer.atwu`), from the conflict with retained rows.

    A token whose forget loss the loss on retained rows holds up loses weight.
    """

    needs_retain: ClassVar[bool] = True

    def start(self, task: Task) -> TokenWeights:
        """See Weighting."""
        scorer = TokenScorer(self, task.model.info.hidden_size, task.model.device)

        def weights(batch: Batch, hidden: Tensor, losses: Tensor) -> Tensor:
            is_answer = batch.labels != IGNORED
            found_N = scorer(hidden[is_answer], losses[is_answer])
            return torch.zeros_like(losses).masked_scatter(is_answer, found_N)

        return weights


def _fixed(selected: Sequence[Tensor]) -> TokenWeights:
    """Weights that never change: which tokens of every row count. Shapes: per row (T,) bool."""
    values = [mask.float() for mask in selected]
    return lambda batch, hidden, losses: batch.align_labels(values) * (batch.labels != IGNORED)


WEIGHTINGS: dict[str, type[Weighting]] = {
    "uniform": UniformWeighting,
    "entropy": EntropyWeighting,
    "atwu": AtwuWeighting,
    "knowledge_spans": KnowledgeSpanWeighting,
}
