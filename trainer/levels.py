"""How likely each token of a row would be to a model that never learned it, estimated by the base model.

The base model reads the row with its telling words exchanged, a few times over. No reading alone is right:

- A stand-in is drawn at random and fits its sentence worse than the word does: too unlikely. The word itself
  is too likely there, since the base model recalls it by what is left of the row. Their mean is close.
- Later pieces of a word that other texts hold follow from its first, as any model knows. They are read where
  the word is left whole, and averaged with the stand-in's. Those of a word that only the domain holds are
  news to a model that never saw it, as they are where the first piece is exchanged.
- What is not exchanged is recalled as well, in some readings: the mean of the lower two of three.

Legend: T tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .base_model import BaseModel
from .batches import by_length, make_batch
from .counterfactual import Counterfactuals, counterfactual_rows
from .dataset import EncodedRow

_READINGS = 3
_LOWER = 2
_TURNS = 4
"""Words are left whole in turn, so that no reading has more than a quarter of them."""
_BATCH_TOKENS = 4096


@torch.no_grad()
def ignorant_logprobs(
    base: BaseModel,
    rows: Sequence[EncodedRow],
    counterfactuals: Counterfactuals,
    *,
    temperature: float,
    seed: int,
) -> list[Tensor]:
    """Log probability of every token but the first, given those before it. Shapes: per row (T - 1,).

    Whatever is attached to the base model has to be disabled meanwhile.
    """
    read = functools.partial(_logprobs, base, temperature)
    readings = [counterfactual_rows(rows, counterfactuals, seed + n) for n in range(_READINGS)]
    found = [read(told, [told, rows]) for told in readings]
    words = [counterfactuals.telling_words(row.ids) for row in rows]
    whole = []
    for turn in range(_TURNS):
        places = [[(start, stop) for start, stop, _ in row[turn::_TURNS]] for row in words]
        whole.append(read(_with_words(readings[0], rows, places), [rows]))
    levels = []
    for index, row_words in enumerate(words):
        stand_ins, themselves = torch.stack([reading[index] for reading in found], dim=1)
        level = stand_ins.sort(dim=0).values[:_LOWER].mean(dim=0)
        stand_in, itself = stand_ins.mean(dim=0), themselves.mean(dim=0)
        for number, (start, stop, is_known) in enumerate(row_words):
            # A token's log probability stands one place before the token.
            first, later = slice(max(start - 1, 0), start), slice(start, stop - 1)
            own = whole[number % _TURNS][index][0] if is_known else itself
            level[first] = (stand_in[first] + itself[first]) / 2
            level[later] = (stand_in[later] + own[later]) / 2
        levels.append(level)
    return levels


def _with_words(
    told: Sequence[EncodedRow],
    rows: Sequence[EncodedRow],
    places: Sequence[Sequence[tuple[int, int]]],
) -> list[EncodedRow]:
    """Rows with some words of other rows put in at their places."""
    result = []
    for changed, row, words in zip(told, rows, places, strict=True):
        ids = list(changed.ids)
        for start, stop in words:
            ids[start:stop] = row.ids[start:stop]
        result.append(dataclasses.replace(changed, ids=tuple(ids)))
    return result


def _logprobs(
    base: BaseModel,
    temperature: float,
    rows: Sequence[EncodedRow],
    asked: Sequence[Sequence[EncodedRow]],
) -> list[Tensor]:
    """Log probability where `rows` are read, of the tokens of K other versions of each.

    Shapes: per row (K, T - 1).
    """
    found: dict[int, Tensor] = {}
    for indices in by_length(rows, _BATCH_TOKENS):
        batch = make_batch(rows, indices, base.pad_id).to(base.device)
        logits = base.logits(batch).float() / temperature
        for place, index in enumerate(indices):
            tokens = torch.tensor([version[index].ids[1:] for version in asked])
            logprobs = logits[place, : tokens.shape[1]].log_softmax(dim=-1)
            found[index] = logprobs.gather(1, tokens.T.to(logits.device)).T.cpu()
    return [found[index] for index in range(len(rows))]
