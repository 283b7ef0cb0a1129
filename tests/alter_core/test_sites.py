"""Where experts may attach, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from alter_core import SUPPORTED_ARCHITECTURES, AlterConfig, default_tap_layer
from alter_core.attach import AttachedModel, measure_sites
from alter_core.config import SITE_KINDS
from alter_core.errors import UnsupportedModelError
from alter_core.sites import check_architecture, decoder_layers, iter_sites, site_linears
from tests.alter_core.conftest import TinyBase
from tests.alter_core.crafted import num_hooks
from tests.support.tiny import ARCHITECTURES, random_substrate, save_model

SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
UNSUPPORTED: dict[str, PretrainedConfig] = {
    "GPT2LMHeadModel": GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    ),
    "MixtralForCausalLM": MixtralConfig(**SMALL, num_local_experts=2),
    "Qwen3MoeForCausalLM": Qwen3MoeConfig(
        **SMALL, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=24
    ),
}


def tiny_llama() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(LlamaConfig(**SMALL))


def test_every_supported_architecture_is_among_the_tested_ones(bases: dict[str, TinyBase]) -> None:
    tested = {type(base.bf16).__name__ for base in bases.values()}
    assert tested == set(SUPPORTED_ARCHITECTURES)


@pytest.mark.parametrize("architecture", UNSUPPORTED)
def test_an_unproven_architecture_is_refused(architecture: str) -> None:
    model = AutoModelForCausalLM.from_config(UNSUPPORTED[architecture])
    assert type(model).__name__ == architecture
    with pytest.raises(UnsupportedModelError, match=f"got {architecture}") as caught:
        measure_sites(model, AlterConfig(tap_layer=0))
    for supported in SUPPORTED_ARCHITECTURES:
        assert supported in str(caught.value)


@pytest.mark.parametrize("name", ["", "llamaforcausallm", "LlamaForCausalLM2", "LlamaModel"])
def test_only_the_exact_name_of_an_architecture_is_accepted(name: str) -> None:
    with pytest.raises(UnsupportedModelError):
        check_architecture(name)


def test_sites_have_the_same_names_and_sizes_whether_fused_or_not(
    bases: dict[str, TinyBase],
) -> None:
    config = AlterConfig(tap_layer=1)
    measured = {name: measure_sites(bases[name].bf16, config) for name in ARCHITECTURES}
    sizes = {
        site: (info.in_features, info.out_features) for site, info in measured["llama"].items()
    }
    assert sizes == {
        f"layers.{layer}.{kind}": size
        for layer in (1, 2)
        for kind, size in {
            "qkv": (128, 128 + 64 + 64),
            "o": (128, 128),
            "gate_up": (128, 192 + 192),
            "down": (192, 128),
        }.items()
    }
    assert all(sites == measured["llama"] for sites in measured.values())


def test_a_head_size_of_its_own_shows_in_the_sites(tmp_path: Any) -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, head_dim=10))
    sites = measure_sites(model, AlterConfig(tap_layer=1))
    assert (sites["layers.1.qkv"].in_features, sites["layers.1.qkv"].out_features) == (16, 40)
    assert (sites["layers.1.o"].in_features, sites["layers.1.o"].out_features) == (20, 16)


@pytest.mark.parametrize("tap_layer", [0, 1, 2])
@pytest.mark.parametrize("targets", [("o",), ("down", "qkv"), SITE_KINDS])
def test_only_the_named_inputs_from_the_tap_layer_on_are_adapted(
    base: TinyBase, tap_layer: int, targets: tuple[str, ...]
) -> None:
    config = AlterConfig(tap_layer=tap_layer, target_modules=targets)
    sites = set(measure_sites(base.bf16, config))
    assert sites == {f"layers.{n}.{kind}" for n in range(tap_layer, 3) for kind in targets}


@pytest.mark.parametrize("tap_layer", [3, 50])
def test_a_tap_layer_behind_the_last_layer_is_refused(base: TinyBase, tap_layer: int) -> None:
    with pytest.raises(UnsupportedModelError, match=f"tap_layer.*0 to 2; got {tap_layer}"):
        measure_sites(base.bf16, AlterConfig(tap_layer=tap_layer))


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no decoder layers"):
        decoder_layers(nn.Linear(2, 3))


def test_a_target_that_a_layer_lacks_is_refused_with_what_it_has() -> None:
    layer = tiny_llama().model.layers[0]
    del layer.self_attn.v_proj
    with pytest.raises(UnsupportedModelError, match="'qkv' matches nothing") as caught:
        site_linears(layer, "qkv")
    assert "self_attn.q_proj+self_attn.k_proj+self_attn.v_proj" in str(caught.value)
    assert "self_attn, mlp" in str(caught.value)


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_a_target_is_refused_if_only_one_layer_lacks_it(kind: str) -> None:
    model = tiny_llama()
    del model.model.layers[1].self_attn
    del model.model.layers[1].mlp
    with pytest.raises(UnsupportedModelError, match=f"{kind!r} matches nothing"):
        list(iter_sites(model, AlterConfig(tap_layer=0, target_modules=(kind,))))


def test_a_module_that_is_no_plain_linear_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"expected torch\.nn\.Linear; got Identity"):
        measure_sites(model, AlterConfig(tap_layer=0))


def test_a_substrate_of_another_size_is_refused_and_leaves_no_hook(
    llama: TinyBase, tmp_path: Any
) -> None:
    other = save_model(tmp_path, "llama", intermediate_size=160)
    substrate = random_substrate(other, AlterConfig(tap_layer=1))
    before = num_hooks(llama.bf16)
    with pytest.raises(UnsupportedModelError, match="sites are not those of this model"):
        AttachedModel(llama.bf16, substrate)
    assert num_hooks(llama.bf16) == before


@pytest.mark.parametrize(
    ("num_layers", "expected"), [(1, 0), (2, 0), (3, 1), (6, 2), (16, 5), (32, 10)]
)
def test_default_tap_layer_is_a_third_of_the_depth(num_layers: int, expected: int) -> None:
    assert default_tap_layer(num_layers) == expected


def test_default_tap_layer_leaves_at_least_one_layer_adapted() -> None:
    for num_layers in range(1, 100):
        model = nn.Module()
        model.model = nn.Module()
        model.model.layers = nn.ModuleList([nn.Identity()] * num_layers)
        assert default_tap_layer(num_layers) < len(decoder_layers(model))


def test_sites_come_in_the_order_of_the_forward_pass() -> None:
    model = tiny_llama()
    order = [(layer, kind) for layer, kind, _ in iter_sites(model, AlterConfig(tap_layer=0))]
    assert order == [(layer, kind) for layer in (0, 1) for kind in SITE_KINDS]
    for layer, kind, linears in iter_sites(model, AlterConfig(tap_layer=0)):
        if kind == "qkv":
            attention = model.model.layers[layer].self_attn
            expected = [attention.q_proj, attention.k_proj, attention.v_proj]
            assert all(a is b for a, b in zip(linears, expected, strict=True))
