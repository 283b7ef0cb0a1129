"""Eq. 8: learning what all experts share, where A or B_r is to be learned at all.

Throw-away B_f stand in for the experts, behind the evidence heads that will be in force. Each loss term
reaches exactly the parameters it is allowed to; afterwards all of it is frozen and experts are trained anew.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from alter_core.attach import AttachedModel
from alter_core.config import AlterConfig
from alter_core.errors import TrainingError
from alter_core.evidence import EvidenceHead
from alter_core.substrate import ForgetExpert, Substrate

from .base_model import BaseModel
from .batches import IGNORED, at_step, make_batch
from .checkpoint import Checkpoint, adam_tensors, finite, restore, restore_adam
from .dataset import EncodedRow
from .losses import (
    LossTerm,
    isolated_gradients,
    masked_mean,
    structural_term,
    token_loss,
    token_nll,
)
from .progress import Reporter
from .settings import SubstrateSettings
from .substrate import Figures, SubstrateText

_CHECKPOINT_EVERY = 20


def is_learned(config: AlterConfig, settings: SubstrateSettings) -> bool:
    """Whether anything but the estimator is to be learned."""
    return config.retain_expert == "trained" or settings.a_gradient != "none"


def train_joint(
    base: BaseModel,
    substrate: Substrate,
    heads: Mapping[str, EvidenceHead],
    text: SubstrateText,
    entropy: Sequence[Tensor],
    settings: SubstrateSettings,
    *,
    seed: int,
    checkpoint: Path,
    run: str,
    reporter: Reporter,
) -> tuple[Substrate, Figures]:
    """Optimises Eq. 8 and returns the substrate with the A and B_r learned.

    Raises: TrainingError on a loss that is not finite; the last good checkpoint stays.
    """
    joint = JointTraining(base, substrate, heads, text, entropy, settings, seed)
    start = joint.restore(Checkpoint.read(checkpoint, run))
    figures: Figures = {}
    try:
        with reporter.stage("substrate, Eq. 8", settings.joint_steps) as stage:
            for step in range(start, settings.joint_steps):
                figures = joint.step(step)
                stage.step(step + 1, **{k: v for k, v in figures.items() if v is not None})
                if (step + 1) % _CHECKPOINT_EVERY == 0:
                    joint.checkpoint(step + 1).write(checkpoint, run)
    finally:
        joint.attached.detach()
    return joint.substrate, figures


class JointTraining:
    """Eq. 8 over A, B_r and stand-ins for the experts."""

    def __init__(
        self,
        base: BaseModel,
        substrate: Substrate,
        heads: Mapping[str, EvidenceHead],
        text: SubstrateText,
        entropy: Sequence[Tensor],
        settings: SubstrateSettings,
        seed: int,
    ) -> None:
        self.base, self.text, self.settings, self.seed = base, text, settings, seed
        self.generator = torch.Generator()
        learns_a = settings.a_gradient != "none"
        self.lora_a = {
            site: tensor.detach().float().clone().requires_grad_(learns_a)
            for site, tensor in substrate.lora_a.items()
        }
        self.retain_lora_b = {
            site: tensor.detach().float().clone().requires_grad_(True)
            for site, tensor in substrate.retain_lora_b.items()
        }
        self.substrate = dataclasses.replace(
            substrate, lora_a=self.lora_a, retain_lora_b=self.retain_lora_b
        )
        self.experts = {
            name: ForgetExpert(
                name=name,
                lora_b={
                    site: torch.zeros(
                        size.out_features, substrate.config.rank, device=base.device
                    ).requires_grad_(True)
                    for site, size in substrate.sites.items()
                },
                evidence=head.to(base.device),
            )
            for name, head in heads.items()
        }
        self.attached = AttachedModel(base.model, self.substrate, list(self.experts.values()))
        self.entropy = _split_entropy(text, entropy)
        groups = [{"params": [*self.retain_lora_b.values()], "lr": settings.learning_rate_b}]
        if learns_a:
            groups.append({"params": [*self.lora_a.values()], "lr": settings.learning_rate_a})
        for expert in self.experts.values():
            groups.append({"params": [*expert.lora_b.values()], "lr": settings.learning_rate_b})
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]])

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Everything that learns, by name."""
        named = {f"{site}.retain.lora_b": t for site, t in self.retain_lora_b.items()}
        if self.settings.a_gradient != "none":
            named |= {f"{site}.lora_a": t for site, t in self.lora_a.items()}
        for name, expert in self.experts.items():
            named |= {f"{name}/{site}.lora_b": t for site, t in expert.lora_b.items()}
        return named

    def restore(self, checkpoint: Checkpoint | None) -> int:
        """Goes back to a checkpoint; returns the step to go on with."""
        if checkpoint is None:
            return 0
        restore(self.parameters, checkpoint.tensors)
        restore_adam(self.optimizer, self.parameters, checkpoint.tensors)
        return checkpoint.step

    def checkpoint(self, step: int) -> Checkpoint:
        """The state after `step` steps."""
        parameters = self.parameters
        return Checkpoint(step=step, tensors=parameters | adam_tensors(self.optimizer, parameters))

    def step(self, step: int) -> Figures:
        """One step on a batch of one domain and one of retained rows; returns the terms' values."""
        terms = self.terms(step)
        if not finite([term.value for term in terms]):
            raise TrainingError(
                f"The loss is not finite at step {step} of the substrate",
                expected="a number",
                got=", ".join(f"{term.name} {term.value.item()}" for term in terms),
                fix="Lower the learning rates; the last good checkpoint is kept for --resume.",
            )
        for parameter, gradient in isolated_gradients(terms).items():
            parameter.grad = gradient
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {term.name: term.value.item() for term in terms}

    def terms(self, step: int) -> list[LossTerm]:
        """The terms of Eq. 8 at a step, each with the parameters that may learn from it.

        B_f^d learns from its own domain's low-entropy tokens, B_r from retained rows, A from high-entropy
        tokens alone unless it is `undetached`.
        """
        settings, names = self.settings, list(self.experts)
        name = names[step % len(names)]
        forget = self._forward(self.text.forget[name], self.entropy[name], step // len(names))
        retain = self._forward(self.text.retain, self.entropy["retain"], step)
        lora_a = tuple(self.lora_a.values())
        shared = lora_a if settings.a_gradient == "undetached" else ()
        terms = [
            LossTerm(
                name="forget",
                value=settings.forget_weight * self._forget_loss(forget),
                parameters=(*self.experts[name].lora_b.values(), *shared),
            )
        ]
        if self.retain_lora_b:
            terms.append(
                LossTerm(
                    name="retain",
                    value=settings.retain_weight * masked_mean(retain.nll, retain.is_answer),
                    parameters=(*self.retain_lora_b.values(), *shared),
                )
            )
        if settings.a_gradient == "high_entropy":
            parts = [masked_mean(f.nll, f.is_answer & ~f.is_low_label) for f in (forget, retain)]
            terms.append(
                LossTerm(
                    name="high_entropy",
                    value=settings.retain_weight * torch.stack(parts).sum(),
                    parameters=lora_a,
                )
            )
        if settings.structure_weight > 0:
            self.generator.manual_seed(self.seed * 1_000_003 + step)
            tsallis_q = self.substrate.config.tsallis_q
            structure = structural_term(
                forget.logits, forget.is_high, lora_a, tsallis_q, self.generator
            )
            terms.append(
                LossTerm(
                    name="structure", value=settings.structure_weight * structure, parameters=lora_a
                )
            )
        return terms

    def _forget_loss(self, forward: _Forward) -> Tensor:
        per_token = token_loss(self.settings.forget_loss, self.settings.forget_cap)
        values = per_token(forward.logits, forward.labels)
        return masked_mean(values, forward.is_answer & forward.is_low_label)

    def _forward(
        self, rows: Sequence[EncodedRow], entropy: Sequence[Tensor], step: int
    ) -> _Forward:
        indices = at_step(rows, self.settings.batch_rows, step, self.seed)
        batch = make_batch(rows, indices, self.base.pad_id).to(self.base.device)
        threshold = self.substrate.config.entropy_threshold
        return _Forward(
            logits=self.base.logits(batch),
            labels=batch.labels,
            is_low_label=batch.align_labels(entropy) <= threshold,
            is_high=batch.align(entropy) > threshold,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Forward:
    """A batch behind the gate. `is_low_label`: of the token predicted; `is_high`: of the token read."""

    logits: Tensor
    labels: Tensor
    is_low_label: Tensor
    is_high: Tensor

    @property
    def is_answer(self) -> Tensor:
        return self.labels != IGNORED

    @property
    def nll(self) -> Tensor:
        return token_nll(self.logits, self.labels)


def _split_entropy(text: SubstrateText, entropy: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    split: dict[str, list[Tensor]] = {}
    start = 0
    for name, rows in (*text.forget.items(), ("retain", text.retain)):
        split[name] = list(entropy[start : start + len(rows)])
        start += len(rows)
    return split
