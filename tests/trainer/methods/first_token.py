"""A language model of nothing but tables, and its probabilities written anew in plain Python.

The hidden state at position t is E[x_t] + C[x_0]: what is predicted depends on the token read and on the
first of the row, so that a context put in front changes it. Logits are O h.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from trainer.batches import Batch
from trainer.dataset import EncodedRow
from trainer.methods import Task

V, D = 7, 4


class FirstTokenModel:
    """What a loss asks of a BaseModel."""

    pad_id = 0
    device = torch.device("cpu")
    max_tokens = 256
    tokenizer = None
    info = SimpleNamespace(hidden_size=D)

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.token, self.first, self.output = (
            torch.randn(V, D, generator=generator).requires_grad_(True) for _ in range(3)
        )

    def hidden_states(self, batch: Batch) -> Tensor:
        return self.token[batch.input_ids] + self.first[batch.input_ids[:, :1]]

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.output.T

    def logits(self, batch: Batch) -> Tensor:
        return self.head(self.hidden_states(batch))

    # --- the same, one row and one token at a time ---

    def plain_logits(self, ids: Sequence[int], place: int) -> list[float]:
        """Logits after reading `ids[: place + 1]`."""
        token, first, output = (t.tolist() for t in (self.token, self.first, self.output))
        hidden = [token[ids[place]][k] + first[ids[0]][k] for k in range(D)]
        return [sum(output[v][k] * hidden[k] for k in range(D)) for v in range(V)]

    def plain_log_probs(self, ids: Sequence[int], place: int) -> list[float]:
        logits = self.plain_logits(ids, place)
        total = math.log(sum(math.exp(value) for value in logits))
        return [value - total for value in logits]

    def answer_nlls(self, row: EncodedRow) -> list[float]:
        """-log p of every answer token."""
        return [-self.plain_log_probs(row.ids, t - 1)[row.ids[t]] for t in answer_places(row)]


def answer_places(row: EncodedRow) -> list[int]:
    return [place for place, is_answer in enumerate(row.is_answer) if is_answer and place > 0]


def row(ids: Sequence[int], num_prompt: int) -> EncodedRow:
    return EncodedRow(
        ids=tuple(ids), is_answer=tuple(place >= num_prompt for place in range(len(ids)))
    )


FORGET = [row([1, 2, 3, 4, 5], 2), row([6, 5, 1], 2), row([2, 2, 6, 3], 1), row([4, 1], 1)]
"""Unequal lengths, and so many that a batch of three is not all of them."""
RETAIN = [row([3, 1, 1], 1), row([5, 6, 2, 2, 1, 4], 3)]
CHOSEN = [3, 0, 2]
"""Of FORGET, neither in order nor from the first on."""


def make_task(**changes: Any) -> Task:
    """The model to be trained is another than its reference, so that divergences are not 0."""
    task = Task(
        model=FirstTokenModel(0),  # type: ignore[arg-type]
        load_copy=lambda: FirstTokenModel(1),  # type: ignore[arg-type,return-value]
        rows=(),
        forget=FORGET,
        retain=RETAIN,
        max_tokens=256,
        seed=5,
    )
    return dataclasses.replace(task, **changes)
