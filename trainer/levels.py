"""How likely each token of a row would be to a model that never learned it.

The base model cannot be asked: whatever is left of a row, it recalls the rest. An n-gram model of the texts
that are to be kept never learned the row either, and ranks its words well; but the base model is another
reader than that. How sure it is of what it does not know is seen where telling words were exchanged for
stand-ins, of which it can recall none. So a word's level is the n-gram model's, times the base model's loss
over the n-gram model's there. First and later pieces of words have a factor each.

Signs, and the end of an answer, follow from how a text is built, which an n-gram model is blind to and no row
has to be learned for. They are read where telling words are exchanged. So are words that are kept there, by
half: how likely they are as a whole the n-gram model says, which of them more than others both say.

Legend: T tokens, N answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base_model import BaseModel
from .batches import by_length, make_batch
from .counterfactual import Counterfactuals, counterfactual_rows
from .dataset import EncodedRow
from .ngram import ngram_nll

_READINGS = 3
_UNTOLD = 1.1
"""Factor of words that have no stand-in over that of first pieces."""
_BATCH_TOKENS = 4096
_FIRST, _LATER, _UNEXCHANGED, _SIGN = range(4)


@torch.no_grad()
def ignorant_logprobs(
    base: BaseModel, rows: Sequence[EncodedRow], counterfactuals: Counterfactuals, *, seed: int
) -> list[Tensor]:
    """Log probability of every token but the first, given those before it. Shapes: per row (T - 1,).

    Whatever is attached to the base model has to be disabled meanwhile.
    """
    told = [
        row
        for number in range(_READINGS)
        for row in counterfactual_rows(rows, counterfactuals, seed + number)
    ]
    expected = ngram_nll(
        counterfactuals.texts, [row.ids for row in (*rows, *told)], base.info.vocab_size
    )
    read = _nll(base, told, [told, list(rows) * _READINGS])
    kinds = [_kinds(row, counterfactuals) for row in rows]
    factors = torch.ones(4)
    stand_ins = _answers(told, [pair[0] for pair in read])
    of_ngrams = _answers(told, expected[len(rows) :])
    is_told = _answers(told, kinds * _READINGS)
    for kind in (_FIRST, _LATER):
        if (chosen := is_told == kind).any():
            factors[kind] = stand_ins[chosen].sum() / of_ngrams[chosen].sum()
    factors[_UNEXCHANGED] = _UNTOLD * factors[_FIRST]
    themselves = [
        torch.stack([pair[1] for pair in read[index :: len(rows)]]).mean(dim=0)
        for index in range(len(rows))
    ]
    is_unexchanged = _answers(rows, kinds) == _UNEXCHANGED
    scale = (
        factors[_UNEXCHANGED]
        * _answers(rows, expected[: len(rows)])[is_unexchanged].sum()
        / _answers(rows, themselves)[is_unexchanged].sum()
    )
    levels = []
    for index, kind in enumerate(kinds):
        itself = themselves[index]
        level = expected[index] * factors[kind]
        level = torch.where(kind == _UNEXCHANGED, (level + scale * itself) / 2, level)
        levels.append(-torch.where(kind == _SIGN, itself, level))
    return levels


def _kinds(row: EncodedRow, counterfactuals: Counterfactuals) -> Tensor:
    """Of every token but the first. Later pieces of a word that the domain alone holds follow from nothing.

    Shape: (T - 1,).
    """
    kinds = torch.full((len(row.ids),), _SIGN)
    for start, stop in counterfactuals.words(row.ids):
        kinds[start:stop] = _UNEXCHANGED
    for start, stop, is_known in counterfactuals.telling_words(row.ids):
        kinds[start] = _FIRST
        if is_known:
            kinds[start + 1 : stop] = _LATER
    return kinds[1:]


def _answers(rows: Sequence[EncodedRow], values: Sequence[Tensor]) -> Tensor:
    """Values of answer tokens alone, row by row. Shapes: per row (T - 1,) -> (N,)."""
    return torch.cat(
        [value[torch.tensor(row.is_answer[1:])] for row, value in zip(rows, values, strict=True)]
    )


def _nll(
    base: BaseModel, rows: Sequence[EncodedRow], asked: Sequence[Sequence[EncodedRow]]
) -> list[Tensor]:
    """Loss where `rows` are read, of the tokens of K versions of each, nats. Shapes: per row (K, T - 1)."""
    found: dict[int, Tensor] = {}
    for indices in by_length(rows, _BATCH_TOKENS):
        batch = make_batch(rows, indices, base.pad_id).to(base.device)
        logits = base.logits(batch).float()
        for place, index in enumerate(indices):
            tokens = torch.tensor([version[index].ids[1:] for version in asked])
            logprobs = logits[place, : tokens.shape[1]].log_softmax(dim=-1)
            found[index] = -logprobs.gather(1, tokens.T.to(logprobs.device)).T.cpu()
    return [found[index] for index in range(len(rows))]
