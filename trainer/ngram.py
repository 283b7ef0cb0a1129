"""How likely tokens are to a reader of other texts alone: an n-gram model with Witten-Bell smoothing.

Each order hands to the next lower one the share that its context's variety calls for (Witten and Bell 1991,
IEEE Transactions on Information Theory 37). Contexts that no row asks for are not counted, so that memory
follows the rows rather than the texts.

Legend: T tokens.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_ORDER = 4

Ids = Sequence[int]


def ngram_nll(texts: Sequence[Ids], rows: Sequence[Ids], vocab_size: int) -> list[Tensor]:
    """Negative log probability, nats, of every token of the rows but the first. Shapes: per row (T - 1,)."""
    counts: dict[tuple[int, ...], Counter[int]] = {
        context: Counter() for ids in rows for _, context in _places(ids)
    }
    for ids in texts:
        for position, context in _places(ids):
            if (found := counts.get(context)) is not None:
                found[ids[position]] += 1
    totals = {context: found.total() for context, found in counts.items()}

    def probability(ids: Ids, position: int) -> float:
        value = 1 / vocab_size
        for length in range(min(_ORDER, position + 1)):
            context = tuple(ids[position - length : position])
            total = totals[context]
            if total == 0:  # nor was any longer one
                break
            found = counts[context]
            value = (found[ids[position]] + len(found) * value) / (total + len(found))
        return value

    return [
        torch.tensor([-math.log(probability(ids, position)) for position in range(1, len(ids))])
        for ids in rows
    ]


def _places(ids: Ids) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Every token's position, with each context of it."""
    for position in range(len(ids)):
        for length in range(min(_ORDER, position + 1)):
            yield position, tuple(ids[position - length : position])
