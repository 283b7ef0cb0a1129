"""What a forget expert is trained for: to answer as the base model would if it had never learned the domain.

`CounterfactualDistillation` says what to answer instead; `TokenPush` only what not to (the paper's IHL, and a
capped loss).

Legend: B batch, T tokens, V vocabulary, N selected tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
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

    def read_itself(self) -> None:
        """Takes the expert's own answers, as they are now, into account."""

    def tensors(self) -> dict[str, Tensor]:
        """State beside the expert, for a checkpoint."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes back to the state that a checkpoint holds."""


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

    def read_itself(self) -> None:
        """See Objective; nothing to do."""

    def tensors(self) -> dict[str, Tensor]:
        """See Objective; there is none."""
        return {}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """See Objective; nothing to do."""


_TAKEN_UP = "taken_up"
_Pair = tuple[EncodedRow, EncodedRow]
"""What the expert reads, and what the base model reads for it."""


class CounterfactualDistillation:
    """Distils the base model's own answers about something it never saw (see `counterfactual`).

    Two kinds of rows take part. The domain's rows: at every selected token the expert is to give the
    base model's distribution over the counterfactual row, words exchanged back (KL), and the true token the
    very probability that its substitute has there (`level_weight`; by KL alone the true token, which the base
    model is sure of, would stay the likeliest). And the base model's own greedy answers to the counterfactual
    questions, words exchanged back (`answer_weight`), so that the expert's answers are fluent where it
    reads itself. Once in a while (`read_itself`) the expert's own answers are looked through: one that
    brings up words of any domain takes the place of the base model's, to be corrected by its counterfactual.
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
        self.counterfactuals, self.seed = counterfactuals, seed
        self.targets = counterfactual_rows(rows, counterfactuals, seed)
        self.answers: dict[int, _Pair] = {}
        self.taken_up: dict[int, list[int]] = {}
        if answer_weight > 0:
            with attached.disabled():
                self.answers = self._ignorant_answers()

    def read_itself(self) -> None:
        """Looks through the expert's own answers, and takes up those that bring up a domain's words."""
        if self.answer_weight == 0:
            return
        for index, answer in self._answers(self.rows):
            row = self.rows[index]
            asked = self.counterfactuals.own_words(row.ids[: row.num_prompt])
            if self.counterfactuals.own_words(answer) & self.counterfactuals.domain_words - asked:
                self._take_up(index, answer)

    def _take_up(self, index: int, answer: Sequence[int]) -> None:
        own = _with_answer(self.rows[index], answer)
        (told,) = counterfactual_rows([own], self.counterfactuals, self.seed)
        self.answers[index] = own, told
        self.taken_up[index] = list(answer)

    def tensors(self) -> dict[str, Tensor]:
        """What `read_itself` took up so far, as a checkpoint holds it: index and ids, -1 behind each."""
        if not self.taken_up:
            return {}
        width = 1 + max(map(len, self.taken_up.values()))
        table = torch.full((len(self.taken_up), width), -1)
        for place, (index, answer) in enumerate(self.taken_up.items()):
            table[place, : 1 + len(answer)] = torch.tensor([index, *answer])
        return {_TAKEN_UP: table}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Goes back to what `tensors` gave."""
        if _TAKEN_UP in tensors:
            for index, *answer in tensors[_TAKEN_UP].tolist():
                self._take_up(index, [token for token in answer if token >= 0])

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

    def _ignorant_answers(self) -> dict[int, _Pair]:
        """By index: the row's question and the counterfactual one, each with the answer to the latter.

        Left out are answers with a domain's words, which the base model still knows and may bring up.
        """
        pairs = {}
        for index, answer in self._answers(self.targets):
            if self.counterfactuals.own_words(answer) & self.counterfactuals.domain_words:
                continue
            pair = _words_back(self.rows[index], self.targets[index], answer)
            if any(pair[0].is_answer):
                pairs[index] = pair
        return pairs

    def _answers(self, rows: Sequence[EncodedRow]) -> Iterator[tuple[int, list[int]]]:
        """Index and greedy answer, end token included, of every row that has a question."""
        asked = [index for index, row in enumerate(rows) if row.num_prompt > 0]
        if not asked:
            return
        prompts = [rows[index].ids[: rows[index].num_prompt] for index in asked]
        longest = max(len(first_answer(self.rows[index])) for index in asked)
        completions = greedy_completions(self.base, prompts, max_new_tokens=longest)
        end = self.base.tokenizer.eos_token_id
        for index, answer in zip(asked, completions, strict=True):
            is_ended = end is not None and len(answer) < longest
            if answer or is_ended:
                yield index, [*answer, end] if is_ended else answer

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


def _with_answer(row: EncodedRow, answer: Sequence[int]) -> EncodedRow:
    """The row's question with another answer."""
    prompt = row.ids[: row.num_prompt]
    is_answer = (False,) * len(prompt) + (True,) * len(answer)
    return EncodedRow(ids=(*prompt, *answer), is_answer=is_answer)


def _words_back(row: EncodedRow, target: EncodedRow, answer: Sequence[int]) -> _Pair:
    """The row's question with an answer to the counterfactual one, and the latter with it.

    Words brought back are the domain's own: the expert may copy them, but must not learn them by heart.
    """
    prompt, other_prompt = row.ids[: row.num_prompt], target.ids[: row.num_prompt]
    back = {other: own for own, other in zip(prompt, other_prompt, strict=True) if own != other}
    is_answer = (False,) * len(prompt) + tuple(token not in back for token in answer)
    own_words = tuple(back.get(token, token) for token in answer)
    return (
        EncodedRow(ids=prompt + own_words, is_answer=is_answer),
        EncodedRow(ids=(*other_prompt, *answer), is_answer=is_answer),
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
