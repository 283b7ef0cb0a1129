"""A substrate and forget experts in bundle format 1, and an adapter for vLLM's LoRA, without any training.

A and B are random. Evidence heads are set so that each unit answers to one name of its domain: unit u has the
name's last G token embeddings p_u as weights, scaled to 1 where the text is the name, and

    score = s sum_u relu(p_u . f / |p_u|^2 - threshold) - 1

is 5 at the name's last token and -1 elsewhere: four tokens of five come to 0.8, below the threshold.

Legend: V vocabulary, D embedding size, G n-gram, H units, T tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from alter_core import (
    AlterConfig,
    EvidenceHead,
    ForgetExpert,
    Provenance,
    Substrate,
    default_tap_layer,
)
from trainer.base_model import BaseModel
from trainer.substrate import initial_substrate, rounded

from .names import TokenIds
from .settings import LORA_ALPHA, RANK

B_SCALE = 0.02
"""Standard deviation of B."""
HIGH_ENTROPY_SHARE = 0.2
"""Share of prose tokens on the high-entropy path."""
_MATCH_THRESHOLD = 0.9
_MATCH_SCORE = 6.0
_OTHERWISE = -1.0
_PROSE_TOKENS = 1024
_ADAPTED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def serving_config(num_layers: int, rank: int = RANK) -> AlterConfig:
    """The defaults, but for the paper's rank."""
    return AlterConfig(rank=rank, lora_alpha=LORA_ALPHA, tap_layer=default_tap_layer(num_layers))


def make_substrate(
    base: BaseModel, config: AlterConfig, prose: TokenIds, folder: Path, *, seed: int
) -> Substrate:
    """A by Kaiming's normal, B_r = 0, and an estimator that calls a fifth of prose tokens high."""
    substrate = initial_substrate(base, config, seed)
    substrate = dataclasses.replace(substrate, lora_a=rounded(substrate.lora_a, base.dtype))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        estimator = substrate.estimator
        estimator.fc2.weight.normal_(std=estimator.fc2.in_features**-0.5)
        ids = torch.tensor([prose[:_PROSE_TOKENS]])
        outputs = base.model(input_ids=ids, output_hidden_states=True)
        entropy = estimator(outputs.hidden_states[config.tap_layer]).flatten()
        # softplus' inverse; the quantile goes to the threshold
        before, wanted = (
            math.log(math.expm1(value))
            for value in (
                entropy.quantile(1 - HIGH_ENTROPY_SHARE).item(),
                config.entropy_threshold,
            )
        )
        estimator.fc2.bias.add_(wanted - before)
    return substrate.write(folder, name="random", training=_provenance(seed))


def make_expert(
    substrate: Substrate,
    embeddings: Tensor,
    name: str,
    triggers: Sequence[TokenIds],
    folder: Path,
    *,
    seed: int,
) -> ForgetExpert:
    """An expert whose head answers to `triggers`, one for each unit.

    Shapes: embeddings (V, D), normalised by the substrate.
    """
    generator = torch.Generator().manual_seed(seed)
    config = substrate.config
    expert = ForgetExpert(
        name=name,
        lora_b={
            site: (
                torch.randn(size.out_features, config.rank, generator=generator) * B_SCALE
            ).bfloat16()
            for site, size in substrate.sites.items()
        },
        evidence=name_head(embeddings, triggers, config),
    )
    return expert.write(folder, substrate, training=_provenance(seed))


@torch.no_grad()
def name_head(
    embeddings: Tensor, triggers: Sequence[TokenIds], config: AlterConfig
) -> EvidenceHead:
    """See the module. Shapes: embeddings (V, D)."""
    ngram, units = config.evidence_ngram, config.evidence_units
    endings = torch.tensor([ids[-ngram:] for ids in triggers])
    assert endings.shape == (units, ngram), "one name of at least `ngram` tokens for each unit"
    patterns_HF = embeddings[endings].flatten(1)
    head = EvidenceHead(embeddings.shape[1], ngram=ngram, num_units=units)
    head.fc1.weight.copy_(patterns_HF / patterns_HF.pow(2).sum(dim=1, keepdim=True))
    head.fc1.bias.fill_(-_MATCH_THRESHOLD)
    head.fc2.weight.fill_(_MATCH_SCORE / (1 - _MATCH_THRESHOLD))
    head.fc2.bias.fill_(_OTHERWISE)
    return head.requires_grad_(False)


def make_adapter(model: Path, config: AlterConfig, folder: Path, *, seed: int) -> None:
    """A LoRA of random A and B on the layers that the experts adapt, in PEFT's format."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    settings = LoraConfig(
        r=config.rank,
        lora_alpha=config.lora_alpha,
        target_modules=_ADAPTED,
        layers_to_transform=list(range(config.tap_layer, base.config.num_hidden_layers)),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(base, settings)
    adapted.save_pretrained(folder)


def _provenance(seed: int) -> Provenance:
    return Provenance(method="random", data={}, seed=seed, settings={}, versions={})
