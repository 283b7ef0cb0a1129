"""Erasure of language memory.

Legend: B batch, T tokens, V vocabulary, N answer tokens of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from alter_core.errors import ConfigError
from trainer.batches import IGNORED, Batch, by_length
from trainer.dataset import EncodedRow
from trainer.evaluation import answer_states

from .base import ForgetLoss, RetainKl, Task, TokenLoss, TokenMethod
from .fields import TEXT, check_positive, check_range
from .guidance import guided_completions, guided_log_probs
from .terms import mean_nll

_GENERATION_TOKENS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Elm(RetainKl, TokenMethod):
    """Erasure of language memory: low-rank distillation of what the base model would say as a novice.

    L_erase + fluency_weight L_fluency + retain_weight L_retain, where
      L_erase    cross-entropy with q(y_t) ~ p_base(y_t | x) (p_base(y_t | novice, x) / p_base(y_t | expert,
                 x))^eta over forgotten answers: the model as its own classifier of the concept,
      L_fluency  negative log-likelihood of text that the base model writes under that guidance, at strength
                 `fluency_eta`, in answer to the forgotten questions,
      L_retain   KL from the base model over retained rows (the paper's cross-entropy less a constant).
    Token level. Source: Gandikota et al. 2024 (arXiv 2410.02760), section 4; eta 500 and LoRA of rank 4.

    Without prompts the contexts come from the data: another forgotten row stands for the expert, a retained
    one for the novice. Small models know too little of either word for the paper's prompts to mean much.

    Raises: ConfigError if only one of the prompts is given.
    """

    learning_rate: float = 5e-5
    eta: float = 500.0
    """> 0."""
    fluency_eta: float = 3.0
    """> 0; far below eta, since what is written must stay readable."""
    fluency_weight: float = 1.0
    """>= 0."""
    written_tokens: int = 64
    """Longest text that the base model writes under guidance, > 0."""
    expert_prompt: str | None = dataclasses.field(default=None, metadata=TEXT)
    """Such as "Here is a text by an expert on ...:"."""
    novice_prompt: str | None = dataclasses.field(default=None, metadata=TEXT)
    """Such as "Here is a text by somebody who never heard of ...:"."""

    adapter_use: ClassVar[Literal["allowed", "required", "refused"]] = "required"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "eta", "fluency_eta", "written_tokens")
        check_range(self, "fluency_weight", self.fluency_weight >= 0, ">= 0")
        if bool(self.expert_prompt) != bool(self.novice_prompt):
            raise ConfigError(
                "ELM compares two prompts",
                expected="an expert prompt and a novice prompt, or neither",
                got="one of them",
            )

    def token_loss(self, task: Task) -> TokenLoss:
        """See TokenMethod."""
        expert, novice = self.contexts(task)
        # What the base model makes of the rows never changes: each is read once.
        states = [answer_states(task.reference, rows) for rows in (task.forget, expert, novice)]

        def loss(logits: Tensor, batch: Batch) -> Tensor:
            with torch.no_grad():
                own, wise, naive = (
                    task.reference.head(torch.cat([hidden[index] for index in batch.indices]))
                    for hidden in states
                )
                target_NV = guided_log_probs(own, naive, wise, self.eta).exp()
            is_answer = batch.labels != IGNORED
            found_NV = logits[is_answer].float().log_softmax(dim=-1)
            losses_N = -(target_NV * found_NV).sum(dim=-1)
            return losses_N.new_zeros(batch.labels.shape).masked_scatter(is_answer, losses_N)

        return loss

    def forget_loss(self, task: Task) -> ForgetLoss:
        """See Method."""
        erase = super().forget_loss(task)
        if self.fluency_weight == 0:
            return erase
        written = self.written_rows(task)

        def loss(batch: Batch) -> Tensor:
            fluent = task.batch(written, batch.indices)
            fluency = mean_nll(task.model.logits(fluent), fluent.labels)
            return erase(batch) + self.fluency_weight * fluency

        return loss

    def contexts(self, task: Task) -> tuple[list[EncodedRow], list[EncodedRow]]:
        """The forgotten rows behind the expert's and behind the novice's context."""
        others = [*task.forget[1:], *task.forget[:1]]
        if self.expert_prompt and self.novice_prompt:
            encode = task.model.tokenizer
            experts, novices = (
                [tuple(encode(text)["input_ids"])] * len(task.forget)
                for text in (self.expert_prompt, self.novice_prompt)
            )
        else:
            experts = [row.ids for row in others]
            novices = [task.retain[place % len(task.retain)].ids for place in range(len(others))]
        limit = task.model.max_tokens - self.written_tokens
        return (
            [_behind(*pair, limit) for pair in zip(experts, task.forget, strict=True)],
            [_behind(*pair, limit) for pair in zip(novices, task.forget, strict=True)],
        )

    def written_rows(self, task: Task) -> list[EncodedRow]:
        """The forgotten questions with answers that the guided base model writes."""
        expert, novice = self.contexts(task)
        written: dict[int, EncodedRow] = {}
        for indices in by_length(expert, _GENERATION_TOKENS):
            prompts, wise, naive = (
                [_question(rows[index], task.forget[index]) for index in indices]
                for rows in (task.forget, expert, novice)
            )
            answers = guided_completions(
                task.reference,
                prompts,
                naive,
                wise,
                strength=self.fluency_eta,
                max_new_tokens=self.written_tokens,
            )
            for index, prompt, answer in zip(indices, prompts, answers, strict=True):
                is_answer = (False,) * len(prompt) + (True,) * len(answer)
                written[index] = EncodedRow(ids=(*prompt, *answer), is_answer=is_answer)
        return [written[index] for index in range(len(task.forget))]


def _behind(context: Sequence[int], row: EncodedRow, limit: int) -> EncodedRow:
    """A row behind a context, which is cut at its beginning where both are longer than the model takes."""
    room = max(limit - len(row.ids), 0)
    kept = tuple(context)[max(len(context) - room, 0) :]
    # A text's first token is predicted behind a context only; the row without one has no such prediction.
    is_answer = (False,) * (len(kept) + 1) + row.is_answer[1:]
    return EncodedRow(ids=(*kept, *row.ids), is_answer=is_answer)


def _question(shown: EncodedRow, row: EncodedRow) -> tuple[int, ...]:
    """What comes before a row's answer, of plain text its first half, with the context that is shown."""
    num_answer = len(row.ids) - (row.num_prompt or len(row.ids) // 2)
    return shown.ids[: len(shown.ids) - num_answer]
