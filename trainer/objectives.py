"""What a forget expert is trained for: to answer as the base model would if it had never learned the domain.

`CounterfactualDistillation` says what to answer instead; `TokenPush` only what not to (the paper's IHL, and a
capped loss).

Legend: B batch, T tokens, V vocabulary, N selected tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from alter_core.attach import AttachedModel

from .base_model import BaseModel
from .batches import IGNORED, Batch, make_batch
from .counterfactual import Counterfactuals
from .dataset import EncodedRow
from .evaluation import first_answer, greedy_completions
from .losses import TokenLoss, masked_mean, token_nll


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The loss of a batch, and each row's answer probability under the expert. Shapes: (), (B,)."""

    loss: Tensor
    probability: Tensor


class Objective(Protocol):
    """A loss over rows of the domain, behind the gate that will be in force."""

    def __call__(self, indices: Sequence[int]) -> Outcome:
        """The loss on the rows at `indices`."""


class TokenPush:
    """Pushes the selected tokens' probability down, to wherever the rest may go."""

    def __init__(
        self,
        base: BaseModel,
        rows: Sequence[EncodedRow],
        selected: Sequence[Tensor],
        loss: TokenLoss,
    ) -> None:
        self.base, self.rows, self.selected, self.loss = base, rows, selected, loss

    def __call__(self, indices: Sequence[int]) -> Outcome:
        """See Objective."""
        batch = make_batch(self.rows, indices, self.base.pad_id).to(self.base.device)
        logits = self.base.logits(batch)
        values = self.loss(logits, batch.labels)
        return Outcome(
            loss=masked_mean(values, _is_selected(batch, self.selected)),
            probability=_answer_probability(logits, batch.labels),
        )


class CounterfactualDistillation:
    """Distils the base model's own answers about something it never saw (see `counterfactual`).

    Two kinds of rows take part. The domain's rows: at every selected token the expert is to give the
    base model's distribution over the counterfactual row, words exchanged back (KL), and the true token the
    very probability that its substitute has there (`level_weight`; by KL alone the true token, which the base
    model is sure of, would stay the likeliest). And the base model's own greedy answers to the counterfactual
    questions, words exchanged back (`answer_weight`), so that the expert's answers are fluent where it
    reads itself.
    """

    def __init__(
        self,
        base: BaseModel,
        attached: AttachedModel,
        rows: Sequence[EncodedRow],
        selected: Sequence[Tensor],
        counterfactuals: Counterfactuals,
        *,
        level_weight: float,
        answer_weight: float,
        seed: int,
    ) -> None:
        self.base, self.attached = base, attached
        self.rows, self.selected = rows, selected
        self.level_weight, self.answer_weight = level_weight, answer_weight
        self.targets = counterfactual_rows(rows, counterfactuals, seed)
        with attached.disabled():
            self.answers = (
                _ignorant_answers(base, rows, self.targets, counterfactuals)
                if answer_weight > 0
                else {}
            )

    def __call__(self, indices: Sequence[int]) -> Outcome:
        """See Objective."""
        batch = make_batch(self.rows, indices, self.base.pad_id).to(self.base.device)
        target = make_batch(self.targets, indices, self.base.pad_id).to(self.base.device)
        logits = self.base.logits(batch)
        divergence, level = self._distance(
            logits, batch, target, _is_selected(batch, self.selected)
        )
        loss = divergence + self.level_weight * level
        if pairs := [self.answers[index] for index in indices if index in self.answers]:
            everything = range(len(pairs))
            answer = make_batch([row for row, _ in pairs], everything, self.base.pad_id)
            told = make_batch([row for _, row in pairs], everything, self.base.pad_id)
            answer, told = answer.to(self.base.device), told.to(self.base.device)
            divergence, _ = self._distance(
                self.base.logits(answer), answer, told, answer.labels != IGNORED
            )
            loss = loss + self.answer_weight * divergence
        return Outcome(loss=loss, probability=_answer_probability(logits, batch.labels))

    def _distance(
        self, logits: Tensor, batch: Batch, target: Batch, is_selected: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(KL divergence from the target, Huber distance of the labels' log probabilities), means per token.

        Shapes: logits (B, T, V), is_selected (B, T) -> (), ().
        """
        with torch.no_grad(), self.attached.disabled():
            target_NV = self.base.logits(target)[is_selected].float()
        labels_N1 = batch.labels[is_selected].unsqueeze(1)
        others_N1 = target.labels[is_selected].unsqueeze(1)
        target_NV = torch.log_softmax(_exchanged(target_NV, labels_N1, others_N1), dim=-1)
        found_NV = torch.log_softmax(logits[is_selected].float(), dim=-1)
        divergence = F.kl_div(found_NV, target_NV, reduction="batchmean", log_target=True)
        level = F.smooth_l1_loss(found_NV.gather(1, labels_N1), target_NV.gather(1, labels_N1))
        return divergence, level


def counterfactual_rows(
    rows: Sequence[EncodedRow], counterfactuals: Counterfactuals, seed: int
) -> list[EncodedRow]:
    """Every row with its telling words exchanged; as many tokens, the same of them answers."""
    return [dataclasses.replace(row, ids=tuple(counterfactuals.row(row.ids, seed))) for row in rows]


def _ignorant_answers(
    base: BaseModel,
    rows: Sequence[EncodedRow],
    targets: Sequence[EncodedRow],
    counterfactuals: Counterfactuals,
) -> dict[int, tuple[EncodedRow, EncodedRow]]:
    """By index: the row's question and the counterfactual one, each with the answer to the latter.

    Rows without a question, plain text, have none; nor have those whose answer holds words of the domain,
    which the base model still knows and may bring up at any question.
    """
    asked = [index for index, row in enumerate(rows) if row.num_prompt > 0]
    if not asked:
        return {}
    completions = greedy_completions(
        base,
        [targets[index].ids[: targets[index].num_prompt] for index in asked],
        max_new_tokens=max(len(first_answer(rows[index])) for index in asked),
    )
    end = base.tokenizer.eos_token_id
    domain_words = set().union(*(counterfactuals.own_words(row.ids) for row in rows))
    pairs = {}
    for index, completion in zip(asked, completions, strict=True):
        if counterfactuals.own_words(completion) & domain_words:
            continue
        answer = completion if end is None else [*completion, end]
        told = _told(rows[index], targets[index], answer)
        if any(told[0].is_answer):
            pairs[index] = told
    return pairs


def _told(
    row: EncodedRow, target: EncodedRow, answer: Sequence[int]
) -> tuple[EncodedRow, EncodedRow]:
    prompt, other_prompt = row.ids[: row.num_prompt], target.ids[: row.num_prompt]
    back = {other: own for own, other in zip(prompt, other_prompt, strict=True) if own != other}
    # Words brought back are the domain's own: the expert may copy them, but must not learn them by heart.
    is_answer = (False,) * len(prompt) + tuple(token not in back for token in answer)
    own_words = tuple(back.get(token, token) for token in answer)
    return (
        EncodedRow(ids=prompt + own_words, is_answer=is_answer),
        EncodedRow(ids=other_prompt + tuple(answer), is_answer=is_answer),
    )


def _exchanged(values_NV: Tensor, one_N1: Tensor, other_N1: Tensor) -> Tensor:
    """Two entries of every row changed for each other."""
    first, second = values_NV.gather(1, one_N1), values_NV.gather(1, other_N1)
    return values_NV.scatter(1, one_N1, second).scatter(1, other_N1, first)


def _is_selected(batch: Batch, selected: Sequence[Tensor]) -> Tensor:
    return batch.align_labels(selected) & (batch.labels != IGNORED)


def _answer_probability(logits: Tensor, labels: Tensor) -> Tensor:
    """exp(mean log p) of each row's answer tokens. Shapes: (B, T, V), (B, T) -> (B,)."""
    num_answer = (labels != IGNORED).sum(dim=1).clamp_min(1)
    return (-token_nll(logits.detach(), labels).sum(dim=1) / num_answer).exp()
