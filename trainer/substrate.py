"""Making the substrate: A, B_r, the entropy estimator and the scale of the embeddings.

By default nothing here is learned but the estimator: A stays as drawn and B_r is the identity. Where A or B_r
are to be learned, Eq. 8 is optimised with throw-away B_f that stand in for the experts, each loss term on
exactly the parameters it is allowed to touch. Afterwards all of it is frozen.

Legend: T tokens, D hidden, R rank, I input features, O stacked output features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from alter_core.attach import AttachedModel, measure_sites
from alter_core.config import AlterConfig
from alter_core.entropy import EntropyEstimator
from alter_core.errors import TrainingError
from alter_core.evidence import EvidenceHead
from alter_core.substrate import ForgetExpert, Substrate

from .base_model import BaseModel
from .batches import IGNORED, at_step, make_batch
from .checkpoint import Checkpoint, adam_tensors, finite, restore, restore_adam
from .dataset import EncodedRow
from .entropy_pass import EntropyPass, run_entropy_pass
from .losses import (
    LossTerm,
    forget_loss,
    isolated_gradients,
    masked_mean,
    structural_term,
    token_nll,
)
from .progress import Reporter, Stage
from .settings import ExpertSettings, SubstrateSettings

_ESTIMATOR_BATCH = 4096
_ESTIMATOR_LEARNING_RATE = 2e-3
_HELD_OUT_SHARE = 0.1
_CHECKPOINT_EVERY = 20

Figures = dict[str, float | int | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubstrateText:
    """What a substrate is fitted on."""

    forget: Mapping[str, Sequence[EncodedRow]]
    retain: Sequence[EncodedRow]
    general: Sequence[EncodedRow]

    @property
    def all_rows(self) -> list[EncodedRow]:
        """Forget rows by domain, then retain, then general."""
        return [row for rows in (*self.forget.values(), self.retain, self.general) for row in rows]


def initial_substrate(base: BaseModel, config: AlterConfig, seed: int) -> Substrate:
    """A by Kaiming's normal initialisation, B_r = 0, an estimator that has learned nothing."""
    generator = torch.Generator().manual_seed(seed)
    sites = measure_sites(base.model, config)
    lora_a = {
        site: (
            torch.randn(config.rank, size.in_features, generator=generator) * size.in_features**-0.5
        )
        for site, size in sites.items()
    }
    retain_lora_b = {
        site: torch.zeros(size.out_features, config.rank)
        for site, size in sites.items()
        if config.retain_expert == "trained"
    }
    embeddings = base.model.get_input_embeddings().weight.detach().float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        estimator = EntropyEstimator(base.info.hidden_size)
    return on_device(
        Substrate(
            base_model=base.info,
            config=config,
            sites=sites,
            lora_a=lora_a,
            retain_lora_b=retain_lora_b,
            estimator=estimator,
            embedding_mean=embeddings.mean(dim=0),
            embedding_std=embeddings.std(dim=0).clamp_min(1e-6),
        ),
        base.device,
    )


def on_device(substrate: Substrate, device: torch.device) -> Substrate:
    """The same substrate with its tensors where the model lives."""
    return dataclasses.replace(
        substrate,
        lora_a={site: tensor.to(device) for site, tensor in substrate.lora_a.items()},
        retain_lora_b={site: tensor.to(device) for site, tensor in substrate.retain_lora_b.items()},
        estimator=substrate.estimator.to(device),
        embedding_mean=substrate.embedding_mean.to(device),
        embedding_std=substrate.embedding_std.to(device),
    )


def rounded(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors as a bundle holds them."""
    return {name: tensor.detach().to(dtype).cpu() for name, tensor in tensors.items()}


def normalised_embeddings(base: BaseModel, substrate: Substrate) -> Tensor:
    """The whole embedding table as evidence heads read it. Shapes: -> (V, D) float32, on the CPU."""
    return substrate.normalise(base.model.get_input_embeddings().weight.detach()).cpu()


def measure_text(base: BaseModel, substrate: Substrate, text: SubstrateText) -> EntropyPass:
    """One pass of the base model over everything the substrate is fitted on."""
    config = substrate.config
    return run_entropy_pass(
        base, text.all_rows, tsallis_q=config.tsallis_q, tap_layer=config.tap_layer
    )


def train_estimator(
    substrate: Substrate,
    passed: EntropyPass,
    settings: SubstrateSettings,
    *,
    seed: int,
    stage: Stage,
) -> Figures:
    """Fits the estimator in place to S_q, with weight on the side of the threshold it must get right.

    Returns its figures on rows that took no part.
    """
    generator = torch.Generator().manual_seed(seed)
    is_held_row = torch.rand(len(passed.entropy), generator=generator) < _HELD_OUT_SHARE
    lengths = torch.tensor([len(values) for values in passed.entropy])
    is_held_T = torch.repeat_interleave(is_held_row, lengths)
    device = substrate.embedding_mean.device
    hidden_TD = passed.hidden_states[~is_held_T].float().to(device)
    entropy_T = torch.cat(passed.entropy)[~is_held_T].to(device)
    if not len(entropy_T):
        raise TrainingError(
            "There is too little text to fit the entropy estimator", expected="several rows"
        )
    threshold = substrate.config.entropy_threshold
    estimator = substrate.estimator.requires_grad_(True)
    optimizer = torch.optim.Adam(estimator.parameters(), lr=_ESTIMATOR_LEARNING_RATE)
    for step in range(settings.estimator_steps):
        chosen = torch.randint(len(entropy_T), (_ESTIMATOR_BATCH,), generator=generator).to(device)
        target = entropy_T[chosen]
        estimate = estimator(hidden_TD[chosen])
        is_high = (target > threshold).float()
        loss = F.smooth_l1_loss(estimate, target)
        loss = loss + F.binary_cross_entropy_with_logits(4 * (estimate - threshold), is_high)
        if not torch.isfinite(loss):
            raise TrainingError(
                "The estimator's loss is not finite", expected="a number", got="NaN"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        stage.step(step + 1, loss=loss.item())
    estimator.requires_grad_(False)
    held_hidden = passed.hidden_states[is_held_T].float().to(device)
    return _estimator_figures(
        estimator(held_hidden).cpu(), torch.cat(passed.entropy)[is_held_T], threshold
    )


def _estimator_figures(estimate: Tensor, exact: Tensor, threshold: float) -> Figures:
    is_high = exact > threshold
    agreement = ((estimate > threshold) == is_high).float().mean().item() if len(exact) else None
    return {
        "held_out_tokens": len(exact),
        "high_entropy_share": is_high.float().mean().item() if len(exact) else None,
        "agreement": agreement,
        "auc": area_under_curve(estimate, is_high),
    }


def area_under_curve(scores: Tensor, is_positive: Tensor) -> float | None:
    """Probability that a positive scores above a negative, ties counted half; None without both kinds."""
    positive, negative = scores[is_positive], scores[~is_positive].sort().values
    if not len(positive) or not len(negative):
        return None
    below = torch.searchsorted(negative, positive, right=False)
    not_above = torch.searchsorted(negative, positive, right=True)
    return ((below + not_above).double().mean() / 2 / len(negative)).item()


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
    expert_settings: ExpertSettings,
    *,
    seed: int,
    checkpoint: Path,
    run: str,
    reporter: Reporter,
) -> tuple[Substrate, Figures]:
    """Optimises Eq. 8 and returns the substrate with the A and B_r learned.

    Raises: TrainingError on a loss that is not finite; the last good checkpoint stays.
    """
    joint = JointTraining(base, substrate, heads, text, entropy, settings, expert_settings, seed)
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
        expert_settings: ExpertSettings,
        seed: int,
    ) -> None:
        self.base, self.text, self.settings, self.seed = base, text, settings, seed
        self.expert_settings = expert_settings
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
        lora_a = tuple(self.lora_a.values())
        shared = lora_a if settings.a_gradient == "undetached" else ()
        self.generator.manual_seed(self.seed * 1_000_003 + step)
        threshold = self.substrate.config.entropy_threshold

        forget_batch, forget_logits, forget_entropy = self._forward(
            self.text.forget[name], self.entropy[name], step // len(names)
        )
        is_low = (forget_batch.align_labels(forget_entropy) <= threshold) & (
            forget_batch.labels != IGNORED
        )
        per_token = forget_loss(self.expert_settings.forget_loss, self.expert_settings.forget_cap)
        forget = masked_mean(per_token(forget_logits, forget_batch.labels), is_low)
        terms = [
            LossTerm(
                name="forget",
                value=self.expert_settings.forget_weight * forget,
                parameters=(*self.experts[name].lora_b.values(), *shared),
            )
        ]
        retain_batch, retain_logits, retain_entropy = self._forward(
            self.text.retain, self.entropy["retain"], step
        )
        is_answer = retain_batch.labels != IGNORED
        retain_nll = token_nll(retain_logits, retain_batch.labels)
        if self.retain_lora_b:
            terms.append(
                LossTerm(
                    name="retain",
                    value=settings.retain_weight * masked_mean(retain_nll, is_answer),
                    parameters=(*self.retain_lora_b.values(), *shared),
                )
            )
        if settings.a_gradient == "high_entropy":
            is_high = (retain_batch.align_labels(retain_entropy) > threshold) & is_answer
            forget_is_high = ~is_low & (forget_batch.labels != IGNORED)
            forget_nll = token_nll(forget_logits, forget_batch.labels)
            high = masked_mean(retain_nll, is_high) + masked_mean(forget_nll, forget_is_high)
            terms.append(
                LossTerm(
                    name="high_entropy", value=settings.retain_weight * high, parameters=lora_a
                )
            )
        if settings.structure_weight > 0:
            structure = structural_term(
                forget_logits,
                forget_batch.align(forget_entropy) > threshold,
                lora_a,
                self.substrate.config.tsallis_q,
                self.generator,
            )
            terms.append(
                LossTerm(
                    name="structure", value=settings.structure_weight * structure, parameters=lora_a
                )
            )
        return terms

    def _forward(self, rows, entropy, step):  # type: ignore[no-untyped-def]
        indices = at_step(len(rows), self.settings.batch_rows, step, self.seed)
        batch = make_batch(rows, indices, self.base.pad_id).to(self.base.device)
        with self.base.accelerator.autocast():
            logits = self.base.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            ).logits
        return batch, logits, entropy


def _split_entropy(text: SubstrateText, entropy: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    split: dict[str, list[Tensor]] = {}
    start = 0
    for name, rows in (*text.forget.items(), ("retain", text.retain)):
        split[name] = list(entropy[start : start + len(rows)])
        start += len(rows)
    return split
