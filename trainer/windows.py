"""N-gram windows of token ids, and how telling each one is of a forget domain.

Legend: W windows, G n-gram length. Ids are shifted by one: 0 stands before the start of a text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .dataset import EncodedRow

Ids = NDArray[np.int64]

MAX_LOG_RARITY = -8.5
"""log10 of the probability below which a window is held for a trace of its domain: once in 300 M tokens."""
_MIN_ROWS = 2
"""A window of an answer counts as a trace if it stands in that many rows, and in a prompt too."""
_TRACES_PER_PROMPT = 8
"""At most that many windows of one prompt are traces on the strength of that prompt alone."""
_SURE_TRACES = 2
"""At least that many are, however common they look, if the negatives do not hold them."""


def windows_of(ids: Sequence[int], ngram: int) -> Ids:
    """Every token with its predecessors, oldest first. Shapes: T ids -> (T, G)."""
    padded = np.concatenate(
        [np.zeros(ngram - 1, dtype=np.int64), np.asarray(ids, dtype=np.int64) + 1]
    )
    return np.lib.stride_tricks.sliding_window_view(padded, ngram).copy()


@dataclasses.dataclass(frozen=True, kw_only=True)
class NegativeWindows:
    """What retained, foreign and general text looks like."""

    windows: Ids
    """Distinct windows. Shape: (W, G)."""
    suffixes: dict[int, NDArray[np.uint64]]
    """Sorted keys of every suffix that occurs, by its length."""
    num_tokens: int
    counts: dict[int, int]
    """How often a token occurs."""
    followers: dict[int, int]
    """By how many different tokens it is followed."""
    bigrams: NDArray[np.uint64]
    """Sorted keys of the bigrams that occur."""
    bigram_counts: NDArray[np.int64]

    @classmethod
    def of(cls, texts: Sequence[Sequence[int]], ngram: int) -> NegativeWindows:
        """Collects the windows of texts."""
        width = max(ngram, 2)
        every = np.concatenate([windows_of(ids, width) for ids in texts])
        tokens, token_counts = np.unique(every[:, -1], return_counts=True)
        bigrams, first, bigram_counts = np.unique(
            window_keys(every[:, -2:]), return_index=True, return_counts=True
        )
        leaders, num_followers = np.unique(every[first, -2], return_counts=True)
        every = every[:, width - ngram :]
        _, first = np.unique(window_keys(every), return_index=True)
        return cls(
            windows=every[np.sort(first)],
            suffixes={n: np.unique(window_keys(every[:, -n:])) for n in range(1, ngram + 1)},
            num_tokens=len(every),
            counts=dict(zip(tokens.tolist(), token_counts.tolist(), strict=True)),
            followers=dict(zip(leaders.tolist(), num_followers.tolist(), strict=True)),
            bigrams=bigrams,
            bigram_counts=bigram_counts,
        )

    def log_rarity(self, windows: Ids) -> NDArray[np.float64]:
        """log10 of how often text like this would hold the last 1..G tokens of a window.

        By a bigram model with Witten-Bell smoothing: a window whose bigrams are all known (`York City ,`)
        is likely in text not yet seen, even if these texts never hold it; one across a name is not.
        Shapes: (W, G) -> (W, G), column n - 1 for the last n tokens.
        """
        counts, followers = _lookup(self.counts, windows), _lookup(self.followers, windows)
        share = (counts + 0.5) / (self.num_tokens + 1)
        ngram = windows.shape[1]
        rarity = np.empty(windows.shape)
        chain = np.zeros(len(windows))
        for place in range(ngram - 1, -1, -1):
            rarity[:, ngram - 1 - place] = np.log10(share[:, place]) + chain
            if place:
                keys = window_keys(windows[:, place - 1 : place + 1])
                found = np.searchsorted(self.bigrams, keys).clip(0, len(self.bigrams) - 1)
                pair_counts = np.where(self.bigrams[found] == keys, self.bigram_counts[found], 0)
                # As many new followers are to be expected as there were different ones.
                new = followers[:, place - 1] + 1
                chain += np.log10(
                    (pair_counts + new * share[:, place]) / (counts[:, place - 1] + new)
                )
        return rarity


@dataclasses.dataclass(frozen=True, kw_only=True)
class DomainWindows:
    """Every window of a forget domain's rows, row after row.

    `starts[i]` is where row i begins; `lengths[i]`, `prompt_lengths[i]` count its windows.
    `suffix_length[w]` is the shortest end of window w that no negative holds, nor is likely to: the tokens
    before it say nothing. G if only the whole window will do, G + 1 if the negatives hold all of it.
    `weight[w]` > 0 marks a trace: a window that pointwise training pushes up. `is_rare[w]`: no negative
    holds window w, nor is likely to.
    """

    windows: Ids
    starts: list[int]
    lengths: list[int]
    prompt_lengths: list[int]
    suffix_length: NDArray[np.int64]
    weight: NDArray[np.float64]
    is_rare: NDArray[np.bool_]

    @classmethod
    def of(
        cls, rows: Sequence[EncodedRow], negatives: NegativeWindows, ngram: int
    ) -> DomainWindows:
        """Collects and weighs the windows of a domain."""
        per_row = [windows_of(row.ids, ngram) for row in rows]
        windows = np.concatenate(per_row)
        lengths = [len(row) for row in per_row]
        # Plain text has no prompt: all of it may carry evidence before it is asked for.
        prompt_lengths = [row.num_prompt or len(row.ids) for row in rows]
        owner = np.repeat(np.arange(len(rows)), lengths)
        is_prompt = np.concatenate(
            [np.arange(n) < p for n, p in zip(lengths, prompt_lengths, strict=True)]
        )
        suffix_length, num_rows, is_asked = _specificity(windows, owner, is_prompt, negatives)
        # Where a text begins is no evidence.
        oldest = (ngram - suffix_length.clip(1, ngram))[:, np.newaxis]
        is_inside = np.take_along_axis(windows, oldest, axis=1)[:, 0] > 0
        is_candidate = (suffix_length <= ngram) & is_inside
        rarity = negatives.log_rarity(windows)[:, -1]
        is_trace = is_candidate & is_asked & (num_rows >= _MIN_ROWS) & (rarity < MAX_LOG_RARITY)
        weight = np.where(is_trace, np.minimum(num_rows, 10) / 10, 0.0)
        for row in range(len(rows)):
            places = np.flatnonzero((owner == row) & is_prompt & is_candidate)
            best = places[np.argsort(rarity[places], kind="stable")[:_TRACES_PER_PROMPT]]
            is_sure = (np.arange(len(best)) < _SURE_TRACES) | (rarity[best] < MAX_LOG_RARITY)
            weight[best[is_sure]] = np.maximum(weight[best[is_sure]], 0.5)
        return cls(
            windows=windows,
            starts=[0, *np.cumsum(lengths)[:-1].tolist()],
            lengths=lengths,
            prompt_lengths=prompt_lengths,
            suffix_length=suffix_length,
            weight=weight,
            is_rare=is_candidate & (rarity < MAX_LOG_RARITY),
        )


def _specificity(
    windows: Ids, owner: Ids, is_prompt: NDArray[np.bool_], negatives: NegativeWindows
) -> tuple[Ids, Ids, NDArray[np.bool_]]:
    """Shortest specific suffix of each window, in how many rows it stands, and whether in a prompt."""
    ngram = windows.shape[1]
    suffix_length = np.full(len(windows), ngram + 1)
    num_rows = np.zeros(len(windows), dtype=np.int64)
    is_asked = np.zeros(len(windows), dtype=np.bool_)
    is_rare = negatives.log_rarity(windows) < MAX_LOG_RARITY
    for length in range(ngram, 0, -1):
        keys = window_keys(windows[:, -length:])
        is_new = ~np.isin(keys, negatives.suffixes[length])
        if length < ngram:
            is_new &= is_rare[:, length - 1]
        _, place = np.unique(keys, return_inverse=True)
        pairs = np.unique(np.stack([place, owner], axis=1), axis=0)
        suffix_length[is_new] = length
        num_rows[is_new] = np.bincount(pairs[:, 0])[place][is_new]
        is_asked[is_new] = np.isin(keys, keys[is_prompt])[is_new]
    return suffix_length, num_rows, is_asked


def _lookup(table: dict[int, int], ids: Ids) -> Ids:
    tokens, place = np.unique(ids, return_inverse=True)
    values = np.array([table.get(token, 0) for token in tokens.tolist()], dtype=np.int64)
    found: Ids = values[place].reshape(ids.shape)
    return found


def window_keys(windows: Ids) -> NDArray[np.uint64]:
    """A 64-bit hash of each window; the same ids give the same key. Shapes: (W, G) -> (W,)."""
    key = np.zeros(len(windows), dtype=np.uint64)
    for place in range(windows.shape[1]):
        key = (key ^ (windows[:, place].astype(np.uint64) + np.uint64(1))) * np.uint64(
            0x9E3779B97F4A7C15
        )
        key ^= key >> np.uint64(29)
    return key
