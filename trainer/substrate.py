"""Making the substrate: A, B_r, the entropy estimator and the scale of the embeddings.

By default nothing here is learned but the estimator: A stays as drawn and B_r is the identity. `joint.py`
learns them where that is asked for.

Legend: T tokens, D hidden, R rank, I input features, O stacked output features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from alter_core.attach import measure_sites
from alter_core.config import AlterConfig
from alter_core.entropy import EntropyEstimator
from alter_core.errors import TrainingError
from alter_core.substrate import Substrate

from .base_model import BaseModel
from .dataset import EncodedRow
from .entropy_pass import EntropyPass, run_entropy_pass
from .progress import Stage
from .settings import SubstrateSettings

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
