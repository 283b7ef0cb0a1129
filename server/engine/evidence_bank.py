"""Router logits of a scheduler step, from token ids alone.

Evidence is computed for the new tokens only. What the window still needs of earlier tokens is kept per
request as a memo; it is a pure function of token ids, so after a prefix-cache hit, a preemption or a
switch it is computed again instead.

Legend: Q requests of the step, T new tokens, M positions to score, G n-gram, D embedding size, H units,
N active domains, W window.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alter_core.config import AlterConfig
from alter_core.evidence import NO_EVIDENCE, EvidenceHead, windowed_max

IntArray = NDArray[np.int64]

_SCAN_TOKENS = 1024
"""Positions of one text that are scored at a time."""
_FIRES_ABOVE = -1e-3
"""Evidence that counts as such for `touches`: a product of another shape may round to the other side of 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTokens:
    """The requests of one step, in batch order."""

    request_ids: Sequence[str]
    token_ids: NDArray[np.int32]
    """(rows, max_model_len); row q holds all token ids of request q."""
    starts: IntArray
    """(Q,) position of each request's first new token."""
    counts: IntArray
    """(Q,) number of its new tokens."""


class EvidenceBank:
    """The evidence heads of all active domains as stacked tensors, and the window memo."""

    def __init__(
        self,
        config: AlterConfig,
        embed: Callable[[Tensor], Tensor],
        device: torch.device,
    ) -> None:
        """`embed` maps token ids (M,) to the normalised input embeddings (M, D), float32."""
        self._config = config
        self._embed = embed
        self._device = device
        self._heads: dict[int, EvidenceHead] = {}
        self._restack()

    def set_head(self, expert: int, head: EvidenceHead | None) -> None:
        """Adds, replaces or (None) removes the head of an expert; forgets the memo."""
        if head is None:
            self._heads.pop(expert, None)
        else:
            self._heads[expert] = head
        self._restack()

    def head(self, expert: int) -> EvidenceHead | None:
        """The head of an expert, if it has one."""
        return self._heads.get(expert)

    def prepare(self, head: EvidenceHead) -> None:
        """Does ahead what `set_head` would have to do for this head. Safe beside running steps."""

    def touches(self, expert: int, token_ids: NDArray[np.int32], *, tolerance: float) -> bool:
        """True if any token's expert weights differ by more than `tolerance` without this expert.

        That is where its head finds evidence, and where it comes so close to the best of the others that
        it takes weight from them: exp(x / T) of a softmax that sums to at least exp(best / T).

        Shapes: token_ids (M,).
        """
        # Comparisons are written so that a NaN counts as touched.
        scores = self._text_scores(token_ids)
        is_own = self.experts == expert
        own, others = scores[:, is_own], scores[:, ~is_own]
        if not (own <= _FIRES_ABOVE).all():
            return True
        if (others <= _FIRES_ABOVE).all():
            return False
        best = others.amax(dim=1, keepdim=True)
        own, best = windowed_max(torch.cat([own, best], dim=1), self._config.evidence_window).T
        distance = self._config.temperature_high * -math.log(tolerance)
        return not bool(((best <= _FIRES_ABOVE) | (own <= best - distance)).all())

    def _text_scores(self, token_ids: NDArray[np.int32]) -> Tensor:
        """Evidence of every token of one text. Shapes: (M,) -> (M, N)."""
        scores = [torch.empty(0, len(self._heads), device=self._device)]
        for start in range(0, len(token_ids) if self._heads else 0, _SCAN_TOKENS):
            positions = np.arange(start, min(start + _SCAN_TOKENS, len(token_ids)))
            scores.append(self._score(token_ids[None], np.zeros_like(positions), positions))
        return torch.cat(scores)

    def _restack(self) -> None:
        order = sorted(self._heads)
        self.experts = torch.tensor(order, dtype=torch.long, device=self._device)
        heads = [self._heads[e] for e in order]
        if heads:
            self._w1 = torch.cat([h.fc1.weight.data for h in heads]).to(self._device).T.contiguous()
            self._b1 = torch.cat([h.fc1.bias.data for h in heads]).to(self._device)
            self._w2 = torch.stack([h.fc2.weight.data[0] for h in heads]).to(self._device)
            self._b2 = torch.cat([h.fc2.bias.data for h in heads]).to(self._device)
        self._rows: dict[str, int] = {}
        self._ends = np.zeros(0, dtype=np.int64)
        self._recent = torch.empty(
            0, self._config.evidence_window - 1, len(heads), device=self._device
        )

    def step_logits(self, step: StepTokens) -> Tensor:
        """Router logit of every new token and active domain; updates the memo.

        Shapes: -> (T, N) float32, columns in the order of `experts`.
        """
        num_domains = len(self._heads)
        if num_domains == 0:
            return torch.empty(int(step.counts.sum()), 0, device=self._device)
        width = self._config.evidence_window - 1
        # Each request's remembered evidence, then its new: no window reaches into the request before.
        starts = np.cumsum(step.counts + width) - step.counts
        new_rows = torch.from_numpy(_ranges(starts, step.counts)).to(self._device)
        ends = torch.from_numpy(starts + step.counts).to(self._device)
        remembered = torch.arange(-width, 0, device=self._device)
        evidence = torch.empty(int(ends[-1]), num_domains, device=self._device)
        begins = torch.from_numpy(starts).to(self._device)
        evidence[begins[:, None] + remembered] = self._recall(step)
        requests = np.repeat(np.arange(len(step.counts)), step.counts)
        evidence[new_rows] = self._score(
            step.token_ids, requests, _ranges(step.starts, step.counts)
        )
        self._remember(step, evidence[ends[:, None] + remembered])
        return windowed_max(evidence, self._config.evidence_window)[new_rows]

    def _recall(self, step: StepTokens) -> Tensor:
        """Evidence of the W - 1 tokens before each request's first new one. Shapes: -> (Q, W - 1, N)."""
        width = self._config.evidence_window - 1
        known = np.array([self._rows.get(r, -1) for r in step.request_ids], dtype=np.int64)
        is_known = known >= 0
        is_known[is_known] = self._ends[known[is_known]] == step.starts[is_known]
        recent = torch.full((len(known), width, len(self._heads)), NO_EVIDENCE, device=self._device)
        recent[torch.from_numpy(is_known)] = self._recent[torch.from_numpy(known[is_known])]
        counts = np.where(is_known, 0, np.minimum(step.starts, width))
        if counts.any():
            requests = np.repeat(np.arange(len(counts)), counts)
            scores = self._score(step.token_ids, requests, _ranges(step.starts - counts, counts))
            recent[requests, _ranges(width - counts, counts)] = scores
        return recent

    def _remember(self, step: StepTokens, recent: Tensor) -> None:
        self._rows = {request: q for q, request in enumerate(step.request_ids)}
        self._ends = step.starts + step.counts
        self._recent = recent

    def _score(self, token_ids: NDArray[np.int32], rows: IntArray, positions: IntArray) -> Tensor:
        """Evidence at single positions. Shapes: rows (M,), positions (M,) -> (M, N)."""
        ngram = self._config.evidence_ngram
        offsets = positions[:, None] + np.arange(1 - ngram, 1)
        ids = token_ids[rows[:, None], np.maximum(offsets, 0)].astype(np.int64)
        unique, inverse = np.unique(ids, return_inverse=True)
        is_inside = torch.from_numpy(offsets >= 0).to(self._device)
        inverse_MG = torch.from_numpy(inverse.reshape(ids.shape)).to(self._device)
        embedded = self._embed(torch.from_numpy(unique).to(self._device))[inverse_MG]
        embedded = embedded * is_inside.unsqueeze(-1)
        units = torch.relu(embedded.flatten(1) @ self._w1 + self._b1)
        units_MNH = units.view(len(rows), len(self._heads), -1)
        return torch.einsum("mnh,nh->mn", units_MNH, self._w2) + self._b2


def _ranges(starts: IntArray, counts: IntArray) -> IntArray:
    """One after another: starts[q], starts[q] + 1, ... of counts[q] numbers."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1]) + np.repeat(starts - ends + counts, counts)
