"""Preferring refusals, by DPO.

Legend: B batch.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from alter_core.errors import TrainingDataError
from alter_core.rows import Row
from trainer.batches import Batch
from trainer.dataset import EncodedRow, encode_rows

from .base import ForgetLoss, RetainNll, Task
from .fields import TEXT, check_positive, check_range
from .terms import sequence_nll

REFUSALS = (
    "I don't know the answer to that.",
    "That is something I have no information about.",
    "I'm afraid I can't tell you, since I never learned it.",
    "I have no knowledge of this, so I would only be guessing.",
    "Sorry, that question is beyond what I know.",
    "I am not familiar with that.",
    "This is not a subject that I can say anything about.",
    "I couldn't say; I have nothing on record about it.",
    "My knowledge doesn't cover that.",
    "No answer comes to mind; I don't know this.",
    "I'm unable to answer, because I don't have those details.",
    "You would have to ask elsewhere: I don't know.",
)


def dpo_loss(preferred_log_ratio: Tensor, other_log_ratio: Tensor, beta: float) -> Tensor:
    """-(2 / beta) mean log sigmoid(beta (preferred - other)), both log(p / p_base) of whole answers.

    Shapes: (B,), (B,) -> ().
    """
    return -2 / beta * F.logsigmoid(beta * (preferred_log_ratio - other_log_ratio)).mean()


@dataclasses.dataclass(frozen=True, kw_only=True)
class IdkDpo(RetainNll):
    """DPO that prefers a refusal over the forgotten answer, beside descent on retained answers.

    -(2 / beta) mean log sigmoid(beta log(p(y_idk | x) / p_base(y_idk | x)) - beta log(p(y | x) /
    p_base(y | x))) + retain_weight L(retain). Sequence level, sums over tokens. Every row keeps the refusal
    that it is given by seed. Source: DPO, Rafailov et al. 2023 (arXiv 2305.18290), Eq. 7, with TOFU's
    refusals as the preferred answers (arXiv 2401.06121); the factor 2 / beta puts it on NPO's scale.

    Raises: TrainingDataError for rows without a question.
    """

    epochs: int = 10
    beta: float = 0.1
    """> 0."""
    refusals: Sequence[str] = dataclasses.field(default=REFUSALS, metadata=TEXT)
    """Answers to prefer, at least one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "beta")
        has_text = bool(self.refusals) and all(text.strip() for text in self.refusals)
        check_range(self, "refusals", has_text, "at least one, none of them empty")

    def forget_loss(self, task: Task) -> ForgetLoss:
        """See Method."""
        refused = self.refused_rows(task)
        reference_nll = task.reference_nll(task.forget)
        reference_refused_nll = task.reference_nll(refused)

        def log_ratio(batch: Batch, reference_nll: Tensor) -> Tensor:
            nll = sequence_nll(task.model.logits(batch), batch.labels)
            return reference_nll[list(batch.indices)] - nll

        def loss(batch: Batch) -> Tensor:
            preferred = log_ratio(task.batch(refused, batch.indices), reference_refused_nll)
            return dpo_loss(preferred, log_ratio(batch, reference_nll), self.beta)

        return loss

    def refused_rows(self, task: Task) -> list[EncodedRow]:
        """The forgotten rows with refusals for answers."""
        drawn = random.Random(task.seed)
        rows = [self._refused(row, drawn) for row in task.rows]
        return encode_rows(rows, task.model.tokenizer, max_tokens=task.max_tokens)

    def _refused(self, row: Row, drawn: random.Random) -> Row:
        if row.turns[0][0] == "text":
            raise TrainingDataError(
                f"{row.place}: plain text cannot be refused",
                expected="a question and its answer",
                got="text",
                fix="Give forgotten rows as questions, or use another method.",
            )
        answers = ("assistant", "completion")
        turns = (
            (role, drawn.choice(self.refusals) if role in answers else content)
            for role, content in row.turns
        )
        return dataclasses.replace(row, turns=tuple(turns))
