"""The gate of one worker: router logits before the forward pass, expert weights at the tap layer.

Legend: T tokens, D hidden, E experts (0 retain, 1..S slots, S + 1 canary).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from alter_core.evidence import NO_EVIDENCE
from alter_core.router import expert_weights
from alter_core.substrate import Substrate

from .evidence_bank import EvidenceBank, StepTokens

_CANARY_LOGIT = 1e3
"""Beats every evidence head, so that a planted canary takes every token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouteRecord:
    """How one step was routed. Shapes: `weights` (T, E), `entropy` (T,); tokens in batch order."""

    step: StepTokens
    weights: Tensor
    entropy: Tensor


PlanEntry = tuple[int, Tensor | None, Tensor]
"""(expert, its tokens or None for all of them, their scaled weights as a column)."""


class Gate:
    """Computes which experts apply to each token of a step. State lives in preallocated buffers."""

    def __init__(
        self,
        substrate: Substrate,
        bank: EvidenceBank,
        *,
        num_experts: int,
        max_tokens: int,
        device: torch.device,
    ) -> None:
        self.config = substrate.config
        self.scaling = substrate.config.scaling
        self.bank = bank
        self.num_experts = num_experts
        self.is_canary_planted = False
        self.plan: list[PlanEntry] = []
        self.records: list[RouteRecord] | None = None
        """Set to a list to record every step. Eager and CPU only: a replayed CUDA graph records nothing."""
        self._step: StepTokens | None = None
        self._estimator = substrate.estimator.to(device)
        self._has_retain_expert = bool(substrate.retain_lora_b)
        self._logits = torch.full((max_tokens, num_experts - 1), NO_EVIDENCE, device=device)
        self._is_token = torch.zeros(max_tokens, dtype=torch.bool, device=device)
        self._counts = torch.zeros(num_experts, 2, dtype=torch.long, device=device)

    def prepare(self, step: StepTokens | None, num_padded: int) -> None:
        """Fills the router logits of the coming forward pass. None: a step without requests."""
        self._logits[:num_padded].fill_(NO_EVIDENCE)
        self._is_token[:num_padded].fill_(False)
        self._step = step
        if step is None:
            return
        num_tokens = int(step.counts.sum())
        self._is_token[:num_tokens].fill_(True)
        if self.is_canary_planted:
            self._logits[:num_tokens, -1] = _CANARY_LOGIT
        elif len(self.bank.experts):
            self._logits[:num_tokens].index_copy_(
                1, self.bank.experts - 1, self.bank.step_logits(step)
            )

    def route(self, hidden_states: Tensor) -> Tensor:
        """Expert weights from the residual stream at the tap layer, Eq. 7 and 9; counts tokens.

        Shapes: (T, D) -> (T, E) float32.
        """
        num_tokens = hidden_states.shape[0]
        entropy = self._estimator(hidden_states)
        is_high = entropy > self.config.entropy_threshold
        weights = expert_weights(self._logits[:num_tokens], is_high, self.config)
        is_token = self._is_token[:num_tokens, None]
        is_routed = (weights > 0) & is_token
        # On the high-entropy path the retain expert always has weight 1: count it where it stands alone.
        is_routed[:, 0] &= weights[:, 1:].sum(dim=-1) == 0
        self._counts[:, 0] += (is_routed & is_high[:, None]).sum(dim=0)
        self._counts[:, 1] += (is_routed & ~is_high[:, None]).sum(dim=0)
        if not self._has_retain_expert:
            weights[:, 0] = 0
        weights = weights * is_token
        if self.records is not None and self._step is not None:
            self.records.append(RouteRecord(step=self._step, weights=weights, entropy=entropy))
        if hidden_states.device.type == "cpu":
            self.plan = self._group(weights)
        return weights

    def _group(self, weights: Tensor) -> list[PlanEntry]:
        """Host plan for the CPU operator: each expert in use, with its tokens."""
        plan: list[PlanEntry] = []
        for expert in weights.any(dim=0).nonzero().flatten().tolist():
            column = weights[:, expert]
            tokens = column.nonzero().flatten()
            scale = column[tokens].unsqueeze(-1) * self.scaling
            plan.append((expert, None if len(tokens) == len(column) else tokens, scale))
        return plan

    def routed_tokens(self) -> list[list[int]]:
        """[high, low] token counts by expert index."""
        return self._counts.tolist()

    def reset_counts(self, expert: int) -> None:
        """Starts an expert's counts again, for a new occupant of its slot."""
        self._counts[expert].zero_()
