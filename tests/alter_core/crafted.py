"""Experts, gates and bundles whose behaviour is known beforehand, token by token."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alter_core import (
    AlterConfig,
    BaseModelInfo,
    DataDigest,
    EntropyEstimator,
    EvidenceHead,
    ForgetExpert,
    Provenance,
    SiteInfo,
    Substrate,
)
from alter_core.attach import AttachedModel

LOW, HIGH = 0.25, 2.5
"""Entropies below and above the default threshold."""


def with_entropy(substrate: Substrate, value: float) -> Substrate:
    """The substrate with an estimator that says `value` for every token."""
    estimator = EntropyEstimator(substrate.base_model.hidden_size).requires_grad_(False)
    for parameter in estimator.parameters():
        parameter.zero_()
    estimator.fc2.bias.fill_(math.log(math.expm1(value)))
    return dataclasses.replace(substrate, estimator=estimator)


def random_lora_b(substrate: Substrate, *, seed: int, scale: float = 0.1) -> dict[str, Tensor]:
    """A bf16 B for every site."""
    generator = torch.Generator().manual_seed(seed)
    rank = substrate.config.rank
    return {
        site: (torch.randn(info.out_features, rank, generator=generator) * scale).bfloat16()
        for site, info in substrate.sites.items()
    }


def constant_expert(
    substrate: Substrate, name: str = "constant", *, seed: int = 0, logit: float = 4.0
) -> ForgetExpert:
    """An expert whose evidence is `logit` at every token."""
    config = substrate.config
    head = EvidenceHead(
        substrate.base_model.hidden_size,
        ngram=config.evidence_ngram,
        num_units=config.evidence_units,
    ).requires_grad_(False)
    for parameter in head.parameters():
        parameter.zero_()
    head.fc2.bias.fill_(logit)
    return ForgetExpert(name=name, lora_b=random_lora_b(substrate, seed=seed), evidence=head)


def trigger_expert(
    substrate: Substrate,
    model: PreTrainedModel,
    name: str,
    *,
    token: int,
    back: int = 0,
    seed: int = 0,
    logit: float = 4.0,
) -> ForgetExpert:
    """An expert whose evidence is `logit` at one token id, and negative at all others.

    With `back`, the evidence stands that many tokens later.
    """
    expert = constant_expert(substrate, name, seed=seed, logit=-logit)
    embeddings = substrate.normalise(model.get_input_embeddings().weight.detach())
    direction = embeddings[token] / embeddings[token].square().sum()
    head, size = expert.evidence, substrate.base_model.hidden_size
    slots = head.fc1.weight.view(len(head.fc1.weight), -1, size)
    slots[0, -1 - back] = direction
    head.fc1.bias[0] = -0.5
    head.fc2.weight[0, 0] = 4 * logit
    alone = torch.zeros(len(embeddings), 1 + back, size)
    alone[:, 0] = embeddings
    scores = head(alone)[:, -1]
    assert abs(scores[token] - logit) < 1e-3
    assert (scores > -logit / 4).sum() == 1
    return expert


def blank_expert(substrate: Substrate, model: PreTrainedModel, name: str) -> ForgetExpert:
    """An expert whose evidence is positive where there is no token, and negative at all tokens."""
    expert = constant_expert(substrate, name, logit=1.0)
    embeddings = substrate.normalise(model.get_input_embeddings().weight.detach())
    head, size = expert.evidence, substrate.base_model.hidden_size
    generator = torch.Generator().manual_seed(0)
    for unit in range(0, len(head.fc1.bias) - 1, 2):
        direction = torch.randn(size, generator=generator)
        head.fc1.weight[unit, -size:] = direction
        head.fc1.weight[unit + 1, -size:] = -direction
    head.fc2.weight.fill_(-10.0)
    assert (head(embeddings.unsqueeze(1)) < 0).all()
    assert (head(torch.zeros(1, size)) > 0).all()
    return expert


def is_latched(ids: Tensor, token: int, window: int) -> Tensor:
    """Whether `token` stands among the last `window` tokens. Shapes: (B, T) -> (B, T) bool."""
    rows = ids.tolist()
    return torch.tensor(
        [[token in row[max(0, t - window + 1) : t + 1] for t in range(len(row))] for row in rows]
    )


def num_hooks(model: PreTrainedModel) -> int:
    """Forward hooks in place; transformers keeps some of its own."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@contextlib.contextmanager
def attached(
    model: PreTrainedModel, substrate: Substrate, experts: Sequence[ForgetExpert] = ()
) -> Iterator[AttachedModel]:
    """Attaches, and detaches whatever happens."""
    attachment = AttachedModel(model, substrate, experts)
    try:
        yield attachment
    finally:
        attachment.detach()


# Bundles that belong to no real model. Every size is another one, so that a transposition shows.

CREATED_AT = datetime(2026, 3, 2, 1, 2, 3, tzinfo=UTC)
BASE_MODEL = BaseModelInfo(
    name="nowhere",
    architecture="LlamaForCausalLM",
    hidden_size=6,
    num_layers=3,
    vocab_size=19,
    fingerprint="5" * 64,
)
SITES = {
    "layers.2.qkv": SiteInfo(in_features=6, out_features=10),
    "layers.2.o": SiteInfo(in_features=8, out_features=6),
}
TRAINING = Provenance(
    method="alter",
    data={"forget": DataDigest(sha256="a" * 64, num_rows=17)},
    seed=3,
    settings={"learning_rate_b": 0.005, "epochs": 3, "auto": False, "note": None, "loss": "ihl"},
    versions={"torch": "2.13.0"},
)


def ramp(*shape: int, start: float) -> Tensor:
    """Values that any format keeps exactly: multiples of 1/16 from `start` on."""
    return (start + torch.arange(math.prod(shape)) / 16).reshape(shape)


def small_substrate(**settings: Any) -> Substrate:
    """A substrate of a few hundred numbers, none of them random."""
    config = AlterConfig(
        tap_layer=2,
        target_modules=("qkv", "o"),
        rank=2,
        evidence_ngram=3,
        evidence_units=5,
        **({"lora_alpha": 16.0} | settings),
    )
    estimator = EntropyEstimator(BASE_MODEL.hidden_size).requires_grad_(False)
    for index, parameter in enumerate(estimator.parameters()):
        parameter.copy_(ramp(*parameter.shape, start=index))
    return Substrate(
        base_model=BASE_MODEL,
        config=config,
        sites=SITES,
        lora_a={
            site: ramp(2, info.in_features, start=index).bfloat16()
            for index, (site, info) in enumerate(SITES.items())
        },
        retain_lora_b={
            site: ramp(info.out_features, 2, start=-1).bfloat16()
            for site, info in SITES.items()
            if config.retain_expert == "trained"
        },
        estimator=estimator,
        embedding_mean=ramp(6, start=-0.5),
        embedding_std=ramp(6, start=0.5),
    )


def small_expert(substrate: Substrate, name: str = "small") -> ForgetExpert:
    """A forget expert for `small_substrate`, none of its numbers random."""
    config = substrate.config
    head = EvidenceHead(
        BASE_MODEL.hidden_size, ngram=config.evidence_ngram, num_units=config.evidence_units
    ).requires_grad_(False)
    for index, parameter in enumerate(head.parameters()):
        parameter.copy_(ramp(*parameter.shape, start=-index))
    return ForgetExpert(
        name=name,
        lora_b={
            site: ramp(info.out_features, config.rank, start=2).bfloat16()
            for site, info in SITES.items()
        },
        evidence=head,
        scalar_weight=0.75,
    )


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Changes `manifest.json` in place."""
    path = folder / "manifest.json"
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Replaces a file and its digest in the manifest, as a forger would."""
    (folder / name).write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit_manifest(folder, lambda raw: raw["files"].update({name: digest}))
