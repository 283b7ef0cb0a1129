"""The gate of one worker: router logits before the forward pass, expert weights at the tap layer.

Legend: T tokens, D hidden, E experts (0 retain, 1..S slots, S + 1 canary).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from alter_core.evidence import NO_EVIDENCE
from alter_core.router import expert_weights
from alter_core.substrate import Substrate

from . import plan
from .evidence_bank import EvidenceBank, StepTokens

_CANARY_LOGIT = 1e3
"""Beats every evidence head, so that a planted canary takes every token."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedRows:
    """How the tokens of one request in one step were routed. Shapes: entropy (T,), weights (T, E)."""

    request: str
    start: int
    """Position of the first of them."""
    entropy: Tensor
    weights: Tensor

    def listed(self, entropy_threshold: float) -> dict[str, Any]:
        """In plain types; of each token the experts in the sum, none where the base weights stand alone."""
        weights: list[list[tuple[int, float]]] = [[] for _ in self.entropy]
        tokens, experts = self.weights.nonzero(as_tuple=True)
        values = self.weights[tokens, experts].tolist()
        for token, expert, value in zip(tokens.tolist(), experts.tolist(), values, strict=True):
            weights[token].append((expert, value))
        return {
            "request": self.request,
            "start": self.start,
            "entropy": self.entropy.tolist(),
            "is_high": (self.entropy > entropy_threshold).tolist(),
            "weights": weights,
        }


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
        is_native: bool,
    ) -> None:
        """`is_native`: the compiled kernels are there and the device is a CPU."""
        self.config = substrate.config
        self.scaling = substrate.config.scaling
        self.bank = bank
        self.num_experts = num_experts
        self.is_canary_planted = False
        self.traced: str | None = None
        """How the ids of the requests begin whose routes are recorded; None: of no request."""
        self.trace: list[TracedRows] = []
        self._step: StepTokens | None = None
        self._estimator = substrate.estimator.to(device).requires_grad_(False)
        self._has_retain_expert = bool(substrate.retain_lora_b)
        self._is_native = is_native
        self._device = device
        self._canary = torch.tensor([num_experts - 1], device=device)
        self._experts = self._canary
        self._step_logits = torch.empty(0, 0, device=device)
        """(tokens of the step, N): router logits of the experts in `_experts`."""
        self._logits = torch.full((max_tokens, num_experts - 1), NO_EVIDENCE, device=device)
        self._is_token = torch.zeros(max_tokens, dtype=torch.bool, device=device)
        self._counts = torch.zeros(num_experts, 2, dtype=torch.long, device=device)
        # What a captured graph writes into, so that its replay can be looked at.
        num_rows = 0 if is_native else max_tokens
        self._entropy = torch.zeros(num_rows, device=device)
        self._weights = torch.zeros(num_rows, num_experts, device=device)

    def prepare(self, step: StepTokens | None, num_padded: int) -> None:
        """Takes the router logits of the coming forward pass. None: a step without requests."""
        self._step = step
        num_tokens = 0 if step is None else int(step.counts.sum())
        if step is None or self.is_canary_planted:
            self._experts = self._canary
            self._step_logits = torch.full((num_tokens, 1), _CANARY_LOGIT, device=self._device)
        else:
            self._experts = self.bank.experts
            self._step_logits = self.bank.step_logits(step)
        if not self._is_native:
            self._fill_buffers(num_tokens, num_padded)

    def _fill_buffers(self, num_tokens: int, num_padded: int) -> None:
        self._logits[:num_padded].fill_(NO_EVIDENCE)
        self._logits[:num_tokens].index_copy_(1, self._experts - 1, self._step_logits)
        self._is_token[:num_padded].fill_(False)
        self._is_token[:num_tokens].fill_(True)

    def route(self, hidden_states: Tensor, residual: Tensor | None) -> Tensor:
        """Routes from the residual stream at the tap layer, Eq. 7 and 9; counts tokens.

        Shapes: (T, D), residual (T, D) -> a plan (`plan.py`) on a CPU, else weights (T, E) float32.
        """
        if not self._is_native:
            entropy, weights = self._route(_sum(hidden_states, residual))
            self._entropy[: len(entropy)].copy_(entropy)
            self._weights[: len(weights)].copy_(weights)
            is_cpu = hidden_states.device.type == "cpu"
            return plan.pack(weights, self.config.top_k) if is_cpu else weights
        fc1, fc2 = self._estimator.fc1, self._estimator.fc2
        routes: Tensor = torch.ops.alter_cpu.route(
            hidden_states,
            residual,
            fc1.weight,
            fc1.bias,
            fc2.weight,
            self._estimator_bias,
            self.config.entropy_threshold,
            self._step_logits,
            self._experts,
            self._counts,
            self.config.temperature_high,
            self.config.top_k,
            self._has_retain_expert,
        )
        if self.traced is not None:
            self._entropy = self._estimator(_sum(hidden_states, residual))
            self._weights = plan.dense(
                routes, num_tokens=len(hidden_states), num_experts=self.num_experts
            )
        return routes

    def record(self) -> None:
        """Adds the traced requests' tokens of the step that was computed last to `trace`."""
        if self.traced is None or self._step is None:
            return
        at = 0
        for request, start, count in zip(
            self._step.request_ids, self._step.starts, self._step.counts, strict=True
        ):
            rows = slice(at, at + int(count))
            if request.startswith(self.traced):
                self.trace.append(
                    TracedRows(
                        request=request,
                        start=int(start),
                        entropy=self._entropy[rows].clone(),
                        weights=self._weights[rows].clone(),
                    )
                )
            at = rows.stop

    @functools.cached_property
    def _estimator_bias(self) -> float:
        return self._estimator.fc2.bias.item()

    def _route(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Entropy and weights of all experts, in torch. Shapes: (T, D) -> (T,), (T, E)."""
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
        return entropy, weights * is_token

    def routed_tokens(self) -> list[list[int]]:
        """[high, low] token counts by expert index."""
        return self._counts.tolist()

    def reset_counts(self, expert: int) -> None:
        """Starts an expert's counts again, for a new occupant of its slot."""
        self._counts[expert].zero_()


def _sum(hidden_states: Tensor, residual: Tensor | None) -> Tensor:
    """The residual stream at a layer's input."""
    return hidden_states if residual is None else hidden_states + residual
