"""The two custom operators that carry Eq. 9 through vLLM's compiled graphs.

`alter::route` runs once per step at the tap layer and returns the expert weights of every token;
`alter::expert_delta` runs in every adapted linear and adds the experts' delta in place. Both look their
state up by name, as vLLM's attention does, so that graphs hold no reference to it; shapes are fixed, and
on an accelerator nothing synchronises with the host.

Legend: T tokens, D hidden, I input features, O output features, R rank, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.utils.torch_utils import direct_register_custom_op

from .gate import Gate
from .slots import SiteSlots

_LIBRARY = torch.library.Library("alter", "FRAGMENT")  # type: ignore[no-untyped-call]
_gate: Gate | None = None
_sites: dict[str, SiteSlots] = {}


def bind(gate: Gate, sites: dict[str, SiteSlots]) -> None:
    """Points the operators of this process at its one installation."""
    global _gate
    _gate = gate
    _sites.clear()
    _sites.update(sites)


def _route(hidden_states: Tensor, residual: Tensor | None) -> Tensor:
    assert _gate is not None, "alter::route ran before installation"
    return _gate.route(hidden_states if residual is None else hidden_states + residual)


def _route_fake(hidden_states: Tensor, residual: Tensor | None) -> Tensor:
    assert _gate is not None
    return hidden_states.new_empty((hidden_states.shape[0], _gate.num_experts), dtype=torch.float32)


def _expert_delta(y: Tensor, x: Tensor, weights: Tensor, site_name: str) -> None:
    assert _gate is not None, "alter::expert_delta ran before installation"
    site = _sites[site_name]
    if x.device.type == "cpu":
        _add_grouped(y, x, site, _gate)
    else:
        _add_dense(y, x, weights, site, _gate.scaling)


def _expert_delta_fake(y: Tensor, x: Tensor, weights: Tensor, site_name: str) -> None:
    return None


def _add_grouped(y: Tensor, x: Tensor, site: SiteSlots, gate: Gate) -> None:
    """Host plan: for each routed expert its tokens only; nothing at all when the plan is empty."""
    for expert, tokens, scale in gate.plan:
        if tokens is None:
            y += (x @ site.lora_a.T * scale).to(x.dtype) @ site.lora_b[expert]
        else:
            shrunk = x.index_select(0, tokens) @ site.lora_a.T
            y.index_add_(0, tokens, (shrunk * scale).to(x.dtype) @ site.lora_b[expert])


def _add_dense(y: Tensor, x: Tensor, weights: Tensor, site: SiteSlots, scaling: float) -> None:
    """Fixed shapes, no host synchronisation: one shrink, one product over all slots."""
    shrunk_TR = x @ site.lora_a.T
    gated_TER = (weights.unsqueeze(-1) * scaling * shrunk_TR.unsqueeze(1)).to(x.dtype)
    y.addmm_(gated_TER.flatten(1), site.lora_b.flatten(0, 1))


direct_register_custom_op("route", _route, fake_impl=_route_fake, target_lib=_LIBRARY)
direct_register_custom_op(
    "expert_delta",
    _expert_delta,
    mutates_args=["y"],
    fake_impl=_expert_delta_fake,
    target_lib=_LIBRARY,
)
