"""Where experts attach: one site per adapted input of a decoder layer.

Projections that read the same input share one A, and their B are stacked in checkpoint order. So a site
has the same tensors whether the model keeps q, k, v apart (Llama in transformers) or fused (Phi-3, and
every model in vLLM).

Legend: R rank, D_in input features of a site, D_out its output features.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn

from .config import AlterConfig
from .errors import UnsupportedModelError

SUPPORTED_ARCHITECTURES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
)
"""Proven by the parity tests. Anything else is refused."""

_LAYOUT: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "qkv": ("self_attn", (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))),
    "o": ("self_attn", (("o_proj",),)),
    "gate_up": ("mlp", (("gate_proj", "up_proj"), ("gate_up_proj",))),
    "down": ("mlp", (("down_proj",),)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Site:
    """One adapted input of one decoder layer."""

    layer: int
    kind: str
    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        """Tensor name prefix in a bundle, e.g. `layers.3.qkv`."""
        return f"layers.{self.layer}.{self.kind}"


def check_architecture(architecture: str) -> None:
    """Raises: UnsupportedModelError unless the architecture is proven."""
    if architecture not in SUPPORTED_ARCHITECTURES:
        raise UnsupportedModelError(
            "This base model's architecture is not supported",
            expected=f"one of {', '.join(SUPPORTED_ARCHITECTURES)}",
            got=architecture,
            fix="MoE expert weights and layers that read `.weight` themselves would bypass the experts.",
        )


def default_tap_layer(num_layers: int) -> int:
    """A third of the depth, the measured best; at least one layer stays adapted."""
    return min(num_layers // 3, num_layers - 1)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers or vLLM model.

    Raises: UnsupportedModelError if the model does not keep them under `model.layers`.
    """
    layers = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no decoder layers under model.layers",
            expected=f"one of {', '.join(SUPPORTED_ARCHITECTURES)}",
            got=type(model).__name__,
        )
    return layers


def site_linears(layer: nn.Module, kind: str) -> list[nn.Module]:
    """The linears that read one input, in the order in which their outputs are stacked.

    Raises: UnsupportedModelError if the layer has none of the known names.
    """
    block_name, alternatives = _LAYOUT[kind]
    block = getattr(layer, block_name, None)
    for names in alternatives:
        linears = [getattr(block, name, None) for name in names]
        if all(isinstance(linear, nn.Module) for linear in linears):
            return [linear for linear in linears if linear is not None]
    raise UnsupportedModelError(
        f"target module {kind!r} matches nothing in {type(layer).__name__}",
        expected=" or ".join(
            "+".join(f"{block_name}.{n}" for n in names) for names in alternatives
        ),
        got=", ".join(n for n, _ in layer.named_children()),
        fix="Leave that module out of target_modules, or use a supported architecture.",
    )


def iter_sites(model: nn.Module, config: AlterConfig) -> Iterator[tuple[int, str, list[nn.Module]]]:
    """(layer index, kind, linears) of every site from `tap_layer` on.

    Raises: UnsupportedModelError if `tap_layer` lies behind the last layer or a target matches nothing.
    """
    layers = decoder_layers(model)
    if config.tap_layer >= len(layers):
        raise UnsupportedModelError(
            "tap_layer lies behind the last layer, so nothing would be adapted",
            expected=f"0 to {len(layers) - 1}",
            got=str(config.tap_layer),
        )
    for index in range(config.tap_layer, len(layers)):
        for kind in config.target_modules:
            yield index, kind, site_linears(layers[index], kind)
