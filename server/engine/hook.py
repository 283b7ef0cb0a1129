"""Installs Eq. 9 into a loaded vLLM model, before it is profiled, compiled and captured.

Each adapted linear keeps its parameters and its name; only its `quant_method` is wrapped, so
weight loading, quantisation and tensor-parallel reductions work as before.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase

from alter_core.errors import UnsupportedModelError
from alter_core.sites import check_architecture, decoder_layers, iter_sites
from alter_core.substrate import Substrate

from . import native, ops
from .base import check_servable
from .evidence_bank import EvidenceBank
from .evidence_tables import TableEvidenceBank
from .gate import Gate
from .slots import ExpertSlots


class TracedRoutes:
    """Hands the step's routes from the tap layer to the linears behind it, within one forward pass."""

    value: Tensor | None = None


class ExpertLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """A linear's own method, followed by the experts' delta."""

    def __init__(self, base: LinearMethodBase, site_name: str, routes: TracedRoutes) -> None:
        self.base = base
        self.site_name = site_name
        self.routes = routes

    def create_weights(self, *args: Any, **kwargs: Any) -> None:
        """Delegates to the wrapped method."""
        self.base.create_weights(*args, **kwargs)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Delegates to the wrapped method."""
        self.base.process_weights_after_loading(layer)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """W0 x + sum_e w_e B_e A x."""
        y: Tensor = self.base.apply(layer, x, bias)
        assert self.routes.value is not None, "the tap layer has not run"
        torch.ops.alter.expert_delta(y, x, self.routes.value, self.site_name)
        return y


def install(
    model: nn.Module,
    substrate: Substrate,
    *,
    architecture: str,
    max_domains: int,
    max_tokens: int,
    vocab_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Gate, ExpertSlots]:
    """Attaches the substrate to a loaded model; every domain slot starts empty.

    Raises: UnsupportedModelError if a site of the substrate has no counterpart in the model;
    UnsupportedEngineError if the substrate is not one to serve.
    """
    check_architecture(architecture)
    check_servable(substrate.config)
    slots = ExpertSlots(max_domains=max_domains)
    routes = TracedRoutes()
    for layer, kind, linears in iter_sites(model, substrate.config):
        (linear,) = linears
        name = f"layers.{layer}.{kind}"
        _check_size(name, linear, substrate)
        slots.add_site(name, linear, substrate.lora_a[name], device, dtype)
        linear.quant_method = ExpertLinearMethod(linear.quant_method, name, routes)
        linear.requires_unquantized_input = True  # type: ignore[assignment]
    if substrate.retain_lora_b:
        slots.write(0, slots.shard_expert(substrate.retain_lora_b))
    embed = _normalised_embedding(model, substrate)
    is_native = device.type == "cpu" and native.load()
    bank = (
        TableEvidenceBank(
            substrate.config,
            embed,
            vocab_size=vocab_size,
            max_domains=max_domains,
            max_tokens=max_tokens,
        )
        if is_native
        else EvidenceBank(substrate.config, embed, device)
    )
    gate = Gate(
        substrate,
        bank,
        num_experts=slots.num_experts,
        max_tokens=max_tokens,
        device=device,
        is_native=is_native,
    )
    ops.bind(gate, slots.sites)
    _wrap_tap_layer(decoder_layers(model)[substrate.config.tap_layer], routes)
    return gate, slots


def _check_size(name: str, linear: nn.Module, substrate: Substrate) -> None:
    wanted = substrate.sites.get(name)
    actual = (linear.input_size, sum(getattr(linear, "output_sizes", None) or [linear.output_size]))
    if wanted is None or actual[0] != wanted.in_features:
        raise UnsupportedModelError(
            f"site {name!r} of the substrate does not fit the served model",
            expected=str(wanted),
            got=f"{type(linear).__name__} {actual}",
        )


def _normalised_embedding(model: nn.Module, substrate: Substrate) -> Any:
    def embed(token_ids: Tensor) -> Tensor:
        return substrate.normalise(model.embed_input_ids(token_ids))  # type: ignore[operator]

    return embed


def _wrap_tap_layer(layer: nn.Module, routes: TracedRoutes) -> None:
    forward = layer.forward

    def routed_forward(
        self: nn.Module,
        positions: Tensor,
        hidden_states: Tensor,
        residual: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        routes.value = torch.ops.alter.route(hidden_states, residual)
        return forward(positions, hidden_states, residual, *args, **kwargs)

    layer.forward = types.MethodType(routed_forward, layer)
