"""Taking back what a forget expert does to text that is to be kept, without losing what it forgets.

An expert changes nothing but tokens that are routed to it (and what attends to them), so it harms kept text
only where its evidence head fires by mistake. Two things are done about that, in this order:

1. calibration: the head's bias is lowered, if that silences false alarms and the domain's own prompts leave
   room for it. A token that no longer fires is computed by the base weights exactly.
2. B_f: on rows that still fire the expert is to give the distribution that the model has without it, and on
   its own domain the one that it has given so far (`answer_divergence`). Nothing else learns.

The idea of a short refresh is that of "A Local Perturbation Theory for Cross-Domain Interference and Recovery
in Multi-Domain RL" (2026, abstract): domains harm each other where they share active routes, and a short
training on what was harmed contracts the harmful part alone. Here the shared routes are known token by token,
so the training reads no others.

Legend: B batch, T tokens, D hidden, N answer tokens, V vocabulary.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alter_core.errors import TrainingError
from alter_core.evidence import EvidenceHead
from alter_core.substrate import ForgetExpert, Substrate

from .base_model import BaseModel
from .batches import IGNORED, at_step, make_batch
from .checkpoint import finite
from .dataset import EncodedRow
from .evaluation import answer_losses, answer_states, attached_experts, mean, routed_logits
from .losses import LossTerm, isolated_gradients
from .progress import Stage
from .settings import RefreshSettings
from .substrate import normalised_embeddings, rounded

_WEAKEST_PROMPTS = 0.05
_MOST_LOWERED = 0.5
"""Share of what the weakest prompts score: the rest is for the same questions in other words."""
_ROOM = 0.5
"""What silenced false alarms are to be below 0 by, in logits, if there is room."""
_MAX_GRADIENT_NORM = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recovery:
    """A refreshed expert, as it is served, and what that changed.

    `figures["kept"][kind]` has the share of rows with false alarms, and the mean answer loss of the rows that
    had any: of the base model (under the substrate), and of the expert before and after.
    `figures["forget_loss"]` has the same of the domain's rows.
    """

    expert: ForgetExpert
    figures: dict[str, Any]


def recover(
    base: BaseModel,
    substrate: Substrate,
    expert: ForgetExpert,
    rows: Sequence[EncodedRow],
    kept: Mapping[str, Sequence[EncodedRow]],
    settings: RefreshSettings,
    stage: Stage,
) -> Recovery | None:
    """Refreshes an expert; None if it acts on none of the kept rows.

    Raises: TrainingError if forgetting is lost beyond the tolerance, nothing is recovered, or the loss is
    not finite.
    """
    gate = _Gate(base, substrate)
    alarmed = {kind: gate.alarmed(expert.evidence, members) for kind, members in kept.items()}
    alarmed = {kind: members for kind, members in alarmed.items() if members}
    if not alarmed:
        return None
    every = [row for members in alarmed.values() for row in members]
    head, lowered_by = gate.calibrated(expert.evidence, rows, every)
    refreshed = dataclasses.replace(expert, evidence=head, digest=None, evaluation=None)
    still_alarmed = gate.alarmed(head, every)
    if still_alarmed:
        lora_b = _train(base, substrate, expert, head, rows, still_alarmed, settings, stage)
        refreshed = dataclasses.replace(refreshed, lora_b=lora_b)
    losses = _losses(base, substrate, expert, refreshed, {**alarmed, _FORGET: rows})
    forgotten = losses.pop(_FORGET)
    _check_forgetting(expert.name, forgotten, settings.tolerance)
    _check_recovery(expert.name, losses)
    return Recovery(
        expert=refreshed,
        figures={
            "bias_lowered_by": lowered_by,
            "num_steps": settings.num_steps if still_alarmed else 0,
            "forget_loss": _means(forgotten),
            "kept": {
                kind: {
                    "num_rows": len(kept[kind]),
                    "false_alarms": {
                        "before": len(members) / len(kept[kind]),
                        "after": len(gate.alarmed(head, members)) / len(kept[kind]),
                    },
                    "loss": _means(losses[kind]),
                }
                for kind, members in alarmed.items()
            },
        },
    )


_FORGET = "forget"
_Losses = dict[str, list[float]]
"""Answer losses of some rows: of the `base` model, and of the expert `before` and `after`."""


def _losses(
    base: BaseModel,
    substrate: Substrate,
    before: ForgetExpert,
    after: ForgetExpert,
    sets: Mapping[str, Sequence[EncodedRow]],
) -> dict[str, _Losses]:
    losses: dict[str, _Losses] = {name: {} for name in sets}
    for when, experts in {"base": [], "before": [before], "after": [after]}.items():
        with attached_experts(base, substrate, experts):
            for name, members in sets.items():
                losses[name][when] = answer_losses(base, members)
    return losses


def _means(losses: _Losses) -> dict[str, float]:
    return {when: mean(found) for when, found in losses.items()}


def _check_forgetting(name: str, losses: _Losses, tolerance: float) -> None:
    found = _means(losses)
    least = found["before"] - tolerance * max(0.0, found["before"] - found["base"])
    if found["after"] < least:
        raise TrainingError(
            f"The refresh would bring back what the expert of domain {name!r} forgets",
            expected=f"a mean answer loss of at least {least:.3f} nats on the domain's rows",
            got=f"{found['after']:.3f}, which was {found['before']:.3f}",
            fix="Raise --refresh-tolerance, or train the domain again with these rows as --retain.",
        )


def _check_recovery(name: str, losses: Mapping[str, _Losses]) -> None:
    def harm(when: str) -> float:
        pairs = [pair for by in losses.values() for pair in zip(by[when], by["base"], strict=True)]
        return mean([abs(found - own) for found, own in pairs])

    before, after = harm("before"), harm("after")
    if 0 < after >= before:
        raise TrainingError(
            f"The refresh of domain {name!r} recovers nothing",
            expected=f"answer losses within {before:.4f} nats of the base model's on kept rows",
            got=f"{after:.4f}",
            fix="Raise --refresh-steps, or train the domain again with these rows as --retain.",
        )


class _Gate:
    """Where a head fires, from token ids alone."""

    def __init__(self, base: BaseModel, substrate: Substrate) -> None:
        self.config = substrate.config
        self.embeddings = normalised_embeddings(base, substrate)

    def logits(self, head: EvidenceHead, rows: Sequence[EncodedRow]) -> list[Tensor]:
        return routed_logits(head, self.embeddings, self.config, [row.ids for row in rows])

    def alarmed(self, head: EvidenceHead, rows: Sequence[EncodedRow]) -> list[EncodedRow]:
        """The rows of which any token is routed to the expert."""
        found = zip(rows, self.logits(head, rows), strict=True)
        return [row for row, logits in found if bool((logits > 0).any())]

    @torch.no_grad()
    def calibrated(
        self, head: EvidenceHead, rows: Sequence[EncodedRow], alarmed: Sequence[EncodedRow]
    ) -> tuple[EvidenceHead, float]:
        """The head with its bias lowered, and by how much, in logits."""
        prompts = [
            # Plain text has no prompt: all of it may carry evidence.
            logits[: row.num_prompt or None].max().item()
            for row, logits in zip(rows, self.logits(head, rows), strict=True)
        ]
        alarms = [logits.max().item() for logits in self.logits(head, alarmed)]
        lowered_by = lowering(prompts, alarms)
        head = copy.deepcopy(head)
        head.fc2.bias.sub_(lowered_by)
        return head, lowered_by


def lowering(prompts: Sequence[float], alarms: Sequence[float]) -> float:
    """By how much a head's bias is lowered, in logits, given the evidence of prompts and of false alarms.

    By as much as silences every false alarm within reach, half of what the weakest prompts score, and a
    little more; by 0 if none is within reach.
    """
    limit = _MOST_LOWERED * float(np.quantile(prompts, _WEAKEST_PROMPTS))
    within = [alarm for alarm in alarms if alarm <= limit]
    return min(max(within) + _ROOM, limit) if within else 0.0


def _train(
    base: BaseModel,
    substrate: Substrate,
    expert: ForgetExpert,
    head: EvidenceHead,
    rows: Sequence[EncodedRow],
    alarmed: Sequence[EncodedRow],
    settings: RefreshSettings,
    stage: Stage,
) -> dict[str, Tensor]:
    """B_f after the refresh, in the dtype it is served in."""
    with attached_experts(base, substrate, []):
        kept_states = answer_states(base, alarmed)
    with attached_experts(base, substrate, [expert]):
        own_states = answer_states(base, rows)
    lora_b = {
        site: tensor.to(base.device, torch.float32, copy=True).requires_grad_(True)
        for site, tensor in expert.lora_b.items()
    }
    parameters = tuple(lora_b.values())
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(
        optimizer, start_factor=1.0, end_factor=0.1, total_iters=settings.num_steps
    )
    learning = dataclasses.replace(expert, lora_b=lora_b, evidence=head)
    with attached_experts(base, substrate, [learning]):
        for step in range(settings.num_steps):
            kept, held = (
                answer_divergence(
                    base, told, states, at_step(told, settings.batch_rows, step, settings.seed)
                )
                for told, states in ((alarmed, kept_states), (rows, own_states))
            )
            terms = [
                LossTerm(name="kept", value=kept, parameters=parameters),
                LossTerm(name="held", value=settings.hold_weight * held, parameters=parameters),
            ]
            _step(optimizer, terms, f"domain {expert.name!r} at step {step}")
            schedule.step()
            stage.step(step + 1, kept=kept.item(), held=held.item())
    return rounded(lora_b, base.dtype)


def _step(optimizer: torch.optim.Optimizer, terms: Sequence[LossTerm], where: str) -> None:
    gradients = isolated_gradients(terms)
    if not finite([*(term.value for term in terms), *gradients.values()]):
        raise TrainingError(
            f"The refresh of {where} is not finite",
            expected="numbers",
            got=", ".join(f"{term.name} {term.value.item()}" for term in terms),
            fix="Check the expert by `alter bundle verify`, or train the domain again.",
        )
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    nn.utils.clip_grad_norm_(list(gradients), _MAX_GRADIENT_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def answer_divergence(
    base: BaseModel,
    rows: Sequence[EncodedRow],
    states: Sequence[Tensor],
    indices: Sequence[int],
) -> Tensor:
    """KL(target || now) at the answer tokens of the rows at `indices`, and the Huber distance of the tokens'
    own log probabilities; mean over tokens, nats.

    KL hardly sees what the target holds for unlikely, and so would let a forgotten answer come back.
    Targets are what `answer_states` gave at another time. Shapes: states per row (N, D) -> ().
    """
    batch = make_batch(rows, indices, base.pad_id).to(base.device)
    is_label = batch.labels != IGNORED
    with torch.no_grad():
        target_NV = base.head(torch.cat([states[index] for index in indices])).float()
        target_NV = target_NV.log_softmax(dim=-1)
    now_NV = base.head(base.hidden_states(batch)[is_label]).float().log_softmax(dim=-1)
    labels_N1 = batch.labels[is_label].unsqueeze(1)
    divergence = F.kl_div(now_NV, target_NV, reduction="batchmean", log_target=True)
    return divergence + F.huber_loss(now_NV.gather(1, labels_N1), target_NV.gather(1, labels_N1))
