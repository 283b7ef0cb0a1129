"""The evidence bank of a CPU: heads as tables that are looked up, by the kernels of `csrc/evidence.cpp`.

The first layer of a head is linear, so what a token adds to a unit at a place of an n-gram is a constant of
that token and head. A table (K, R, G, C, H) holds it, in half precision: for the first tokens of the
vocabulary from the start, for others from their first appearance on, which costs one product for each active
head.

Legend: C columns that lie together, D embedding size, G n-gram, H units, K groups of columns, M tokens, N
active domains, R rows, one for each token known, W window.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alter_core.config import AlterConfig
from alter_core.errors import EngineError
from alter_core.evidence import EvidenceHead

from .evidence_bank import EvidenceBank, StepTokens

EVIDENCE_CACHE_BYTES = 2 << 30
"""Most that the tables of all slots may take; memory is taken row by row as tokens appear."""
_FIRST_TOKENS = 16_384
"""Known from the start: tokenizers that merge pairs number their tokens by frequency."""
_CHUNK_TOKENS = 2048
"""Tokens whose embeddings are multiplied at a time."""
_GROUP = 8
"""Columns that lie together: memory is taken for as many heads at once."""
_SPARE_COLUMNS = 2
"""For a head that is staged, and for one that a rollback would need."""
_LANES = 16
"""The kernels read units by as many."""


def cache_bytes(config: AlterConfig, *, vocab_size: int, max_domains: int) -> int:
    """What the tables take once every slot is occupied and every token was seen, or the budget."""
    return min(EVIDENCE_CACHE_BYTES, vocab_size * _row_bytes(config, max_domains))


def _padded_units(config: AlterConfig) -> int:
    return -(-config.evidence_units // _LANES) * _LANES


def _row_bytes(config: AlterConfig, max_domains: int) -> int:
    """Of one token."""
    num_columns = -(-(max_domains + _SPARE_COLUMNS) // _GROUP) * _GROUP
    numbers = config.evidence_ngram * num_columns * _padded_units(config)
    return numbers * torch.half.itemsize


@dataclasses.dataclass(eq=False)
class _Column:
    """A head's column, and how many of its rows are filled, of which generation of rows."""

    index: int
    num_filled: int = 0
    generation: int = 0


class TableEvidenceBank(EvidenceBank):
    """An `EvidenceBank` over compiled kernels; logits differ from it by the rounding of the tables."""

    def __init__(
        self,
        config: AlterConfig,
        embed: Callable[[Tensor], Tensor],
        *,
        vocab_size: int,
        max_domains: int,
        max_tokens: int,
    ) -> None:
        """`max_tokens`: most new tokens of a step; the tables have room for at least one request's."""
        self._padded_units = _padded_units(config)
        of_a_request = max_tokens + config.evidence_window + config.evidence_ngram
        affordable = EVIDENCE_CACHE_BYTES // _row_bytes(config, max_domains)
        self._capacity = min(vocab_size, max(affordable, of_a_request))
        self._row_of_token = torch.full((vocab_size,), -1, dtype=torch.int32)
        self._token_of_row = torch.zeros(self._capacity, dtype=torch.long)
        self._num_rows = 0
        self._generation = 0
        self._give_rows(torch.arange(min(self._capacity, _FIRST_TOKENS)))
        num_groups = -(-(max_domains + _SPARE_COLUMNS) // _GROUP)
        ngram = config.evidence_ngram
        shape = (num_groups, self._capacity, ngram, _GROUP, self._padded_units)
        self._table = torch.empty(shape, dtype=torch.half)
        self._columns: weakref.WeakKeyDictionary[EvidenceHead, _Column] = (
            weakref.WeakKeyDictionary()
        )
        super().__init__(config, embed, torch.device("cpu"))

    def prepare(self, head: EvidenceHead) -> None:
        """See `EvidenceBank.prepare`. Raises: EngineError if the head does not fit half precision."""
        self._catch_up(head)

    def _column(self, head: EvidenceHead) -> _Column:
        if (column := self._columns.get(head)) is None:
            taken = {column.index for column in self._columns.values()}
            free = set(range(len(self._table) * _GROUP)) - taken
            if not free:
                raise EngineError("The router's tables have no room for another head")
            column = self._columns[head] = _Column(min(free))
        return column

    def _catch_up(self, head: EvidenceHead) -> None:
        """Fills the rows that the head's column does not have yet."""
        column, generation, num_rows = self._column(head), self._generation, self._num_rows
        if column.generation != generation:
            column.generation, column.num_filled = generation, 0
        for start in range(column.num_filled, num_rows, _CHUNK_TOKENS):
            rows = slice(start, min(start + _CHUNK_TOKENS, num_rows))
            self._fill(head, column, self._embed(self._token_of_row[rows].clone()), rows)

    def _fill(self, head: EvidenceHead, column: _Column, embedded: Tensor, rows: slice) -> None:
        ngram, num_units = self._config.evidence_ngram, self._config.evidence_units
        target_MGH = self._table[column.index // _GROUP, rows, :, column.index % _GROUP]
        for place, weight in enumerate(head.fc1.weight.data.chunk(ngram, dim=1)):
            target_MGH[:, place, :num_units] = embedded @ weight.T
        target_MGH[:, -1, :num_units] += head.fc1.bias.data
        target_MGH[:, :, num_units:] = 0
        if not target_MGH.isfinite().all():
            raise EngineError(
                "An evidence head is too large for the router's tables",
                expected="contributions of a token below 65,504",
                got="a larger one",
                fix="Train the expert again; its router has diverged.",
            )
        column.num_filled = rows.stop

    def _restack(self) -> None:
        order = sorted(self._heads)
        heads = [self._heads[expert] for expert in order]
        self.experts = torch.tensor(order, dtype=torch.long)
        for head in heads:
            self._catch_up(head)
        columns = [self._column(head).index for head in heads]
        self._active_columns = torch.tensor(columns, dtype=torch.long)
        self._w2 = torch.zeros(len(heads), self._padded_units)
        for place, head in enumerate(heads):
            self._w2[place, : self._config.evidence_units] = head.fc2.weight.data[0]
        self._b2 = torch.tensor([head.fc2.bias.item() for head in heads])
        self._forget_windows(num_states=0)

    def _forget_windows(self, num_states: int) -> None:
        window, num_domains = self._config.evidence_window, len(self._heads)
        self._state_of_request: dict[str, int] = {}
        self._step_requests: Sequence[str] = ()
        self._states = torch.zeros(0, dtype=torch.long)
        self._end_of_state = torch.full((num_states,), -1)
        self._filled = torch.zeros(num_states, dtype=torch.long)
        self._blocks = torch.empty(num_states, window, num_domains)
        self._running = torch.empty(num_states, num_domains)

    def step_logits(self, step: StepTokens) -> Tensor:
        """See `EvidenceBank.step_logits`."""
        logits = torch.empty(int(step.counts.sum()), len(self._heads))
        if not self._heads:
            return logits
        self._find_states(step.request_ids)
        is_done = self._with_rows(
            torch.ops.alter_cpu.evidence_step,
            torch.from_numpy(step.token_ids),
            torch.from_numpy(step.starts),
            torch.from_numpy(step.counts),
            self._states,
            self._end_of_state,
            self._filled,
            self._blocks,
            self._running,
            *self._kernel_tables,
            logits,
        )
        if is_done:
            return logits
        half = len(step.counts) // 2
        parts = (_part(step, slice(half)), _part(step, slice(half, None)))
        return torch.cat([self.step_logits(part) for part in parts])

    def _text_scores(self, token_ids: NDArray[np.int32]) -> Tensor:
        scores = torch.empty(len(token_ids), len(self._heads))
        if self._heads and not self._with_rows(
            torch.ops.alter_cpu.evidence_scores,
            torch.from_numpy(token_ids),
            *self._kernel_tables,
            scores,
        ):
            half = len(token_ids) // 2
            reach = self._config.evidence_ngram - 1
            second = self._text_scores(token_ids[max(0, half - reach) :])
            return torch.cat([self._text_scores(token_ids[:half]), second[min(half, reach) :]])
        return scores

    @property
    def _kernel_tables(self) -> tuple[Tensor, ...]:
        return self._row_of_token, self._table, self._active_columns, self._w2, self._b2

    def _with_rows(self, kernel: Callable[..., Tensor], *arguments: object) -> bool:
        """Calls a kernel, adding the rows that it names. False if they are too many for the tables."""
        missing = kernel(*arguments)
        for _ in range(2):  # the second time, rows that were there had to go
            if len(missing) == 0:
                return True
            self._add_rows(missing)
            missing = kernel(*arguments)
        return len(missing) == 0

    def _add_rows(self, tokens: Tensor) -> None:
        """Gives tokens a row in the table of every active head, after clearing all rows if they are full."""
        if self._num_rows + len(tokens) > self._capacity:
            self._generation += 1
            self._num_rows = 0
            self._row_of_token.fill_(-1)
            tokens = tokens[: self._capacity]
        rows = self._give_rows(tokens)
        embedded = self._embed(tokens)
        for head in self._heads.values():
            column = self._columns[head]
            self._fill(head, column, embedded, rows)
            column.generation = self._generation

    def _give_rows(self, tokens: Tensor) -> slice:
        rows = slice(self._num_rows, self._num_rows + len(tokens))
        self._token_of_row[rows] = tokens
        self._row_of_token[tokens] = torch.arange(rows.start, rows.stop, dtype=torch.int32)
        self._num_rows = rows.stop
        return rows

    def _find_states(self, request_ids: Sequence[str]) -> None:
        """Gives each request of the step the state it had in the step before, or a new one."""
        if request_ids == self._step_requests:
            return
        if len(request_ids) > len(self._end_of_state):
            self._forget_windows(num_states=2 * len(request_ids))
        kept = {
            request: self._state_of_request[request]
            for request in request_ids
            if request in self._state_of_request
        }
        free = iter(set(range(len(self._end_of_state))).difference(kept.values()))
        for request in request_ids:
            if request not in kept:
                kept[request] = state = next(free)
                self._end_of_state[state] = -1
        self._state_of_request = kept
        self._states = torch.tensor([kept[request] for request in request_ids], dtype=torch.long)
        self._step_requests = list(request_ids)


def _part(step: StepTokens, requests: slice) -> StepTokens:
    return StepTokens(
        request_ids=step.request_ids[requests],
        token_ids=step.token_ids[requests],
        starts=step.starts[requests],
        counts=step.counts[requests],
    )
