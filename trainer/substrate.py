"""What all domains of a base model share: A, the retain expert, the entropy estimator.

`new_substrate` makes one with a random A and B_r = 0. `learn_shared` is the joint stage of Eq. 8 for
those who want A or B_r trained: with throw-away B_f, under strict gradient isolation. Afterwards nothing of
a substrate ever changes.

Legend: B batch, T tokens, N tokens, D hidden, R rank.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

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
from .batches import IGNORED, Batch, at_step, make_batch, sample_rows
from .dataset import EncodedRow
from .entropy_pass import run_entropy_pass
from .losses import inverted_hinge, retain_loss, structural_term
from .progress import Reporter
from .settings import SubstrateSettings

_ESTIMATOR_BATCH = 1024
_ESTIMATOR_RATE = 2e-3
_ESTIMATOR_SLOPE = 4.0
"""How steeply the distance from the threshold counts as certainty of the path."""
_HOLD_OUT_EVERY = 10


def new_substrate(
    base: BaseModel,
    config: AlterConfig,
    texts: Mapping[str, Sequence[EncodedRow]],
    settings: SubstrateSettings,
    *,
    seed: int,
    reporter: Reporter,
) -> tuple[Substrate, dict[str, float]]:
    """Random A, B_r = 0, embedding statistics and a trained estimator; and the estimator's figures.

    `texts` are the kinds of text that the estimator learns from: forget, retain, general.
    Raises: UnsupportedModelError if the configuration fits no site.
    """
    sites = measure_sites(base.model, config)
    generator = torch.Generator().manual_seed(seed)
    estimator, figures = _train_estimator(
        base, config, texts, settings, seed=seed, reporter=reporter
    )
    embeddings = base.model.get_input_embeddings().weight.detach().float().cpu()
    substrate = Substrate(
        base_model=base.info,
        config=config,
        sites=sites,
        lora_a={
            name: _kaiming(config.rank, site.in_features, generator).to(base.dtype)
            for name, site in sites.items()
        },
        retain_lora_b={
            name: torch.zeros(site.out_features, config.rank, dtype=base.dtype)
            for name, site in sites.items()
            if config.retain_expert == "trained"
        },
        estimator=estimator,
        embedding_mean=embeddings.mean(dim=0),
        embedding_std=embeddings.std(dim=0).clamp_min(1e-6),
    )
    return substrate, figures


def _kaiming(rank: int, in_features: int, generator: torch.Generator) -> Tensor:
    """A of N(0, 1 / in_features): the paper's Kaiming initialisation. Shapes: -> (R, in_features)."""
    return torch.randn(rank, in_features, generator=generator) / math.sqrt(in_features)


def _train_estimator(
    base: BaseModel,
    config: AlterConfig,
    texts: Mapping[str, Sequence[EncodedRow]],
    settings: SubstrateSettings,
    *,
    seed: int,
    reporter: Reporter,
) -> tuple[EntropyEstimator, dict[str, float]]:
    states, targets, held_out = [], [], {}
    for name, rows in texts.items():
        if not rows:
            continue
        chosen = sample_rows(rows, settings.estimator_tokens, seed)
        passed = run_entropy_pass(
            base, chosen, tsallis_q=config.tsallis_q, tap_layer=config.tap_layer
        )
        entropy = torch.cat(passed.entropy)
        is_held = torch.cat(
            [
                torch.full((len(row.ids),), i % _HOLD_OUT_EVERY == 0, dtype=torch.bool)
                for i, row in enumerate(chosen)
            ]
        )
        states.append(passed.hidden_states[~is_held].float())
        targets.append(entropy[~is_held])
        held_out[name] = (passed.hidden_states[is_held].float(), entropy[is_held])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        estimator = EntropyEstimator(base.info.hidden_size)
    _fit_estimator(
        estimator,
        torch.cat(states),
        torch.cat(targets),
        config,
        settings.estimator_steps,
        seed,
        reporter,
    )
    figures = {}
    for name, (hidden, exact) in held_out.items():
        estimated = estimator(hidden).detach()
        is_high = exact > config.entropy_threshold
        figures[f"entropy_auc_{name}"] = area_under_roc(estimated, is_high)
        agreement = (estimated > config.entropy_threshold) == is_high
        figures[f"entropy_path_agreement_{name}"] = float(agreement.float().mean())
    return estimator.requires_grad_(False), figures


def _fit_estimator(
    estimator: EntropyEstimator,
    states_ND: Tensor,
    targets_N: Tensor,
    config: AlterConfig,
    steps: int,
    seed: int,
    reporter: Reporter,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(estimator.parameters(), lr=_ESTIMATOR_RATE)
    with reporter.bar("entropy estimator", steps) as bar:
        for _ in range(steps):
            chosen = torch.randint(len(states_ND), (_ESTIMATOR_BATCH,), generator=generator)
            estimate, target = estimator(states_ND[chosen]), targets_N[chosen]
            certainty = _ESTIMATOR_SLOPE * (estimate - config.entropy_threshold)
            is_high = (target > config.entropy_threshold).float()
            loss = F.smooth_l1_loss(estimate, target)
            loss = loss + F.binary_cross_entropy_with_logits(certainty, is_high)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.advance(loss=loss.item())


def area_under_roc(scores: Tensor, is_positive: Tensor) -> float:
    """Probability that a positive scores above a negative; NaN without one of the two kinds.

    Shapes: (N,), (N,) bool.
    """
    num_positive = int(is_positive.sum())
    num_negative = len(scores) - num_positive
    if num_positive == 0 or num_negative == 0:
        return math.nan
    ranks = torch.empty(len(scores), dtype=torch.double)
    ranks[scores.argsort()] = torch.arange(1, len(scores) + 1, dtype=torch.double)
    positive_ranks = ranks[is_positive].sum().item()
    return (positive_ranks - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def learns_shared(config: AlterConfig, settings: SubstrateSettings) -> bool:
    """True if A or B_r are to be learned, so that the joint stage has work to do."""
    return (
        config.retain_expert == "trained"
        or settings.a_gradient != "none"
        or settings.structure_weight > 0
    )


def learn_shared(
    base: BaseModel,
    substrate: Substrate,
    heads: Mapping[str, EvidenceHead],
    domains: Mapping[str, tuple[Sequence[EncodedRow], Sequence[Tensor]]],
    retain: tuple[Sequence[EncodedRow], Sequence[Tensor]],
    settings: SubstrateSettings,
    *,
    seed: int,
    reporter: Reporter,
) -> Substrate:
    """The joint stage of Eq. 8; rows come with the base model's S_q of their tokens.

    Raises: TrainingError if a loss is not finite.
    """
    stage = JointStage(base, substrate, heads, settings, seed=seed)
    try:
        with reporter.bar("substrate: A and retain expert", settings.steps) as bar:
            for step in range(settings.steps):
                name = list(domains)[step % len(domains)]
                loss = stage.step(step, name, domains[name], retain)
                if not math.isfinite(loss):
                    raise TrainingError(
                        "The substrate's loss is not finite",
                        expected="a number",
                        got=f"{loss} at step {step}",
                        fix="Lower --learning-rate-a or --learning-rate-b.",
                    )
                bar.advance(loss=loss)
    finally:
        stage.attached.detach()
    return stage.result()


class JointStage:
    """One optimisation of A, B_r and throw-away B_f. Each term's gradient reaches only what Eq. 8 allows."""

    def __init__(
        self,
        base: BaseModel,
        substrate: Substrate,
        heads: Mapping[str, EvidenceHead],
        settings: SubstrateSettings,
        *,
        seed: int,
    ) -> None:
        self.base, self.settings, self.seed = base, settings, seed
        self.config = substrate.config
        self.lora_a = _parameters(substrate.lora_a, base)
        self.retain_lora_b = _parameters(substrate.retain_lora_b, base)
        self.forget_lora_b = {
            name: _parameters(
                {
                    s: torch.zeros(i.out_features, self.config.rank)
                    for s, i in substrate.sites.items()
                },
                base,
            )
            for name in heads
        }
        self.trained = dataclasses.replace(
            substrate, lora_a=dict(self.lora_a), retain_lora_b=dict(self.retain_lora_b)
        )
        experts = [
            ForgetExpert(name=name, lora_b=dict(self.forget_lora_b[name]), evidence=head)
            for name, head in heads.items()
        ]
        self.attached = AttachedModel(base.model, self.trained, experts)
        self._generator = torch.Generator().manual_seed(seed)
        b_parameters = [*self.retain_lora_b.values()]
        for parameters in self.forget_lora_b.values():
            b_parameters += parameters.values()
        self._optimizer = torch.optim.Adam(
            [
                {"params": [*self.lora_a.values()], "lr": settings.learning_rate_a},
                {"params": b_parameters, "lr": settings.learning_rate_b},
            ]
        )

    def step(
        self,
        step: int,
        name: str,
        domain: tuple[Sequence[EncodedRow], Sequence[Tensor]],
        retain: tuple[Sequence[EncodedRow], Sequence[Tensor]],
    ) -> float:
        """One step on one domain; returns the weighted loss."""
        self._optimizer.zero_grad()
        loss = self._accumulate(self.forget_terms(name, *self._batch(domain, step)))
        loss += self._accumulate(self.retain_terms(*self._batch(retain, step)))
        self._optimizer.step()
        return loss

    def forget_terms(
        self, name: str, batch: Batch, entropy: Tensor
    ) -> list[tuple[float, Tensor, list[Tensor]]]:
        """(weight, loss, parameters it may reach) of the forget and the structural term."""
        settings, threshold = self.settings, self.config.entropy_threshold
        logits = self._logits(batch)
        is_answer = batch.labels != IGNORED
        is_low = is_answer & (entropy <= threshold)
        reached = [*self.forget_lora_b[name].values()]
        if settings.a_gradient == "undetached":
            reached += self.lora_a.values()
        terms = []
        if is_low.any():
            loss = inverted_hinge(logits[is_low], batch.labels[is_low]).mean()
            terms.append((settings.forget_weight, loss, reached))
        is_high = is_answer & (entropy > threshold)
        if settings.structure_weight > 0 and is_high.any():
            a = [*self.lora_a.values()]
            loss = structural_term(logits[is_high], a, self.config.tsallis_q, self._generator)
            terms.append((settings.structure_weight, loss, a))
        return terms

    def retain_terms(
        self, batch: Batch, entropy: Tensor
    ) -> list[tuple[float, Tensor, list[Tensor]]]:
        """(weight, loss, parameters it may reach) of the retain term, for B_r and for A."""
        if not self.retain_lora_b:
            return []
        logits = self._logits(batch)
        is_answer = batch.labels != IGNORED
        losses = retain_loss(logits[is_answer], batch.labels[is_answer])
        weight = self.settings.retain_weight
        terms = [(weight, losses.mean(), [*self.retain_lora_b.values()])]
        is_high = entropy[is_answer] > self.config.entropy_threshold
        if self.settings.a_gradient != "none" and is_high.any():
            terms.append((weight, losses[is_high].mean(), [*self.lora_a.values()]))
        return terms

    def _accumulate(self, terms: list[tuple[float, Tensor, list[Tensor]]]) -> float:
        total = 0.0
        for weight, loss, parameters in terms:
            gradients = torch.autograd.grad(
                weight * loss, parameters, retain_graph=True, allow_unused=True
            )
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.grad = (
                        gradient if parameter.grad is None else parameter.grad + gradient
                    )
            total += weight * loss.item()
        return total

    def _batch(
        self, data: tuple[Sequence[EncodedRow], Sequence[Tensor]], step: int
    ) -> tuple[Batch, Tensor]:
        rows, entropies = data
        indices = at_step(len(rows), self.settings.batch_rows, step, self.seed)
        batch = make_batch(rows, indices, self.base.pad_id).to(self.base.device)
        return batch, batch.align(entropies)

    def _logits(self, batch: Batch) -> Tensor:
        with self.base.accelerator.autocast():
            output = self.base.model(
                input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
            )
        return output.logits

    def result(self) -> Substrate:
        """The substrate with what was learned, in the base model's dtype."""
        return dataclasses.replace(
            self.trained,
            lora_a=_frozen(self.lora_a, self.base),
            retain_lora_b=_frozen(self.retain_lora_b, self.base),
        )


def _parameters(tensors: Mapping[str, Tensor], base: BaseModel) -> dict[str, Tensor]:
    return {
        name: tensor.detach().float().to(base.device, copy=True).requires_grad_()
        for name, tensor in tensors.items()
    }


def _frozen(parameters: Mapping[str, Tensor], base: BaseModel) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", base.dtype) for name, tensor in parameters.items()}
