"""Padded batches, and their order by seed.

Legend: B batch, T tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .dataset import EncodedRow

IGNORED = -100
_POOL_BATCHES = 8
"""Batches are cut from pools of so many, sorted by length: little padding, varied company."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows padded on the right. Shapes: all (B, T).

    `labels[b, t]` is the token that position t predicts, if that token is an answer, else IGNORED.
    """

    indices: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return dataclasses.replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            labels=self.labels.to(device),
        )

    def align(self, values: Sequence[Tensor]) -> Tensor:
        """Per-token values of every row at the tokens' own positions. Shapes: per row (T_row,) -> (B, T).

        0 at padding.
        """
        aligned = torch.zeros(self.input_ids.shape, dtype=values[0].dtype)
        for place, index in enumerate(self.indices):
            aligned[place, : len(values[index])] = values[index]
        return aligned.to(self.input_ids.device)

    def align_labels(self, values: Sequence[Tensor]) -> Tensor:
        """The same at the positions that predict the tokens, where `labels` holds them."""
        aligned = self.align(values)
        return torch.nn.functional.pad(aligned[:, 1:], (0, 1))


def make_batch(rows: Sequence[EncodedRow], indices: Sequence[int], pad_id: int) -> Batch:
    """Pads the rows at `indices`."""
    chosen = [rows[index] for index in indices]
    width = max(len(row.ids) for row in chosen)
    input_ids = torch.full((len(chosen), width), pad_id, dtype=torch.long)
    labels = torch.full((len(chosen), width), IGNORED, dtype=torch.long)
    for place, row in enumerate(chosen):
        ids = torch.tensor(row.ids)
        input_ids[place, : len(ids)] = ids
        labels[place, : len(ids) - 1] = torch.where(
            torch.tensor(row.is_answer[1:]), ids[1:], IGNORED
        )
    lengths = torch.tensor([len(row.ids) for row in chosen])
    attention_mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
    return Batch(
        indices=tuple(indices), input_ids=input_ids, attention_mask=attention_mask, labels=labels
    )


def by_length(rows: Sequence[EncodedRow], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, at most `batch_tokens` padded tokens each."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].ids))
    batch: list[int] = []
    for index in order:
        if batch and len(rows[index].ids) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def at_step(rows: Sequence[EncodedRow], batch_rows: int, step: int, seed: int) -> list[int]:
    """The rows of training step `step`: epochs of seeded permutations, cut into batches of similar length.

    A pure function of its arguments, so a resumed run goes on as if nothing had happened.
    """
    batch_rows = min(batch_rows, len(rows))
    per_epoch = -(-len(rows) // batch_rows)
    epoch, place = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(rows), generator=generator).tolist()
    near: list[int] = []
    pool = batch_rows * _POOL_BATCHES
    for start in range(0, len(order), pool):
        near += sorted(order[start : start + pool], key=lambda index: len(rows[index].ids))
    start = batch_rows * int(torch.randperm(per_epoch, generator=generator)[place])
    return near[start : start + batch_rows]


def sample_rows(rows: Sequence[EncodedRow], max_tokens: int, seed: int) -> list[EncodedRow]:
    """Seeded choice of rows with at most `max_tokens` tokens in all; at least one row."""
    generator = torch.Generator().manual_seed(seed)
    chosen: list[EncodedRow] = []
    num_tokens = 0
    for index in torch.randperm(len(rows), generator=generator).tolist():
        row = rows[index]
        if chosen and num_tokens + len(row.ids) > max_tokens:
            continue
        chosen.append(row)
        num_tokens += len(row.ids)
    return chosen
