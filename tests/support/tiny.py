"""Tiny random models and bundles of every supported architecture, for tests. Nothing here is trained."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from alter_core import (
    AlterConfig,
    BaseModelInfo,
    EntropyEstimator,
    EvidenceHead,
    ForgetExpert,
    Provenance,
    Substrate,
)
from alter_core.attach import measure_sites

VOCAB_SIZE = 512
ARCHITECTURES = ("llama", "qwen3", "mistral", "phi3")
PROVENANCE = Provenance(method="random", data={}, seed=0, settings={}, versions={})

_SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
_CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "phi3": Phi3Config,
}


@dataclasses.dataclass(frozen=True)
class TinyBundles:
    """Folders of a model, its substrate and its experts."""

    model: Path
    substrate: Path
    experts: dict[str, Path]


def save_model(
    folder: Path, architecture: str = "llama", *, seed: int = 0, **overrides: Any
) -> Path:
    """Saves a random bf16 model of an architecture in transformers layout."""
    extra = {"head_dim": 32} if architecture in ("qwen3", "mistral") else {}
    if architecture == "mistral":
        extra["sliding_window"] = None
    torch.manual_seed(seed)
    config = _CONFIGS[architecture](**(_SIZES | extra | overrides))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def load_model(folder: Path) -> PreTrainedModel:
    """The saved model, bf16, for evaluation."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def random_substrate(model_folder: Path, config: AlterConfig, *, seed: int = 1) -> Substrate:
    """A substrate with random A, fitting a saved model. Its estimator puts tokens on both paths."""
    generator = torch.Generator().manual_seed(seed)
    model = load_model(model_folder)
    info = BaseModelInfo.from_folder(model_folder)
    sites = measure_sites(model, config)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(torch.bfloat16)

    embeddings = model.get_input_embeddings().weight.detach().float()
    torch.manual_seed(seed)
    estimator = EntropyEstimator(info.hidden_size)
    torch.nn.init.constant_(estimator.fc2.bias, config.entropy_threshold)
    torch.nn.init.normal_(estimator.fc2.weight, std=1.0)
    return Substrate(
        base_model=info,
        config=config,
        sites=sites,
        lora_a={
            s: normal(config.rank, i.in_features, scale=i.in_features**-0.5)
            for s, i in sites.items()
        },
        retain_lora_b={
            s: normal(i.out_features, config.rank, scale=0.05)
            for s, i in sites.items()
            if config.retain_expert == "trained"
        },
        estimator=estimator.requires_grad_(False),
        embedding_mean=embeddings.mean(dim=0),
        embedding_std=embeddings.std(dim=0),
    )


def random_expert(
    substrate: Substrate, name: str, *, seed: int, trigger_rate: float = 0.05
) -> ForgetExpert:
    """An expert with random B, whose head fires on about `trigger_rate` of random n-grams."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    config = substrate.config
    head = EvidenceHead(
        substrate.base_model.hidden_size,
        ngram=config.evidence_ngram,
        num_units=config.evidence_units,
    )
    with torch.no_grad():
        features = torch.randn(2000, head.fc1.in_features, generator=generator)
        scores = head.fc2(torch.relu(head.fc1(features))).squeeze(-1)
        head.fc2.bias -= scores.quantile(1 - trigger_rate)
        scale = 4.0 / scores.std()
        head.fc2.weight *= scale
        head.fc2.bias *= scale
    return ForgetExpert(
        name=name,
        lora_b={
            s: (torch.randn(i.out_features, config.rank, generator=generator) * 0.1).to(
                torch.bfloat16
            )
            for s, i in substrate.sites.items()
        },
        evidence=head.requires_grad_(False),
    )


def make_bundles(
    folder: Path,
    architecture: str = "llama",
    *,
    num_experts: int = 2,
    config: AlterConfig | None = None,
    trigger_rate: float = 0.05,
    **model_overrides: Any,
) -> TinyBundles:
    """A saved model, substrate and experts named `domain-0`, `domain-1`, ..."""
    model = save_model(folder / "model", architecture, **model_overrides)
    substrate = random_substrate(
        model, config or AlterConfig(tap_layer=1, rank=8, lora_alpha=16.0, evidence_window=16)
    )
    substrate = substrate.write(folder / "substrate", name="tiny", training=PROVENANCE)
    experts = {}
    for index in range(num_experts):
        name = f"domain-{index}"
        expert = random_expert(substrate, name, seed=10 + index, trigger_rate=trigger_rate)
        expert.write(
            folder / name, substrate, training=PROVENANCE, evaluation={"forget_probability": 0.01}
        )
        experts[name] = folder / name
    return TinyBundles(model=model, substrate=folder / "substrate", experts=experts)
