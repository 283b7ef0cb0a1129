"""The two custom operators that carry Eq. 9 through vLLM's compiled graphs.

`alter::route` runs once per step at the tap layer and returns the step's routes; `alter::expert_delta` runs
in every adapted linear and adds the experts' delta in place. Both look their state up by name, as vLLM's
attention does, so that graphs hold no reference to it; shapes are fixed, and on an accelerator nothing
synchronises with the host.

Routes are a plan: of `plan.py` on a CPU, where a linear without routed tokens returns at once, or of
`triton_delta.py` on a GPU; an accelerator that lacks kernels takes the weights of all experts (T, E).

Legend: T tokens, D hidden, I input features, O output features, R rank, E experts.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType

import torch
from torch import Tensor
from vllm.platforms import current_platform

from . import native, plan
from .gate import Gate
from .slots import SiteSlots

_LIBRARY = torch.library.Library("alter", "FRAGMENT")  # type: ignore[no-untyped-call]
_gate: Gate | None = None
_sites: dict[str, SiteSlots] = {}
_triton: ModuleType | None = None
"""`triton_delta` where it serves the installation."""
logger = logging.getLogger(__name__)


def bind(gate: Gate, sites: dict[str, SiteSlots]) -> None:
    """Points the operators of this process at its one installation."""
    global _gate, _triton
    _register()
    _gate = gate
    _triton = _triton_kernels(next(iter(sites.values())).lora_a)
    _sites.clear()
    _sites.update(sites)
    if native.load():
        torch.ops.alter_cpu.clear_sites()
        for name, site in sites.items():
            torch.ops.alter_cpu.set_site(name, site.lora_a, site.lora_b, gate.scaling)


@functools.cache
def _register() -> None:
    """Once for a process. The compiled kernels bring their own `expert_delta` for a CPU."""
    if not native.load():
        _LIBRARY.impl("expert_delta", _expert_delta_grouped, "CPU")  # type: ignore[no-untyped-call]
    _LIBRARY.impl("route", _route, "CPU")  # type: ignore[no-untyped-call]
    if (key := current_platform.dispatch_key) != "CPU":
        _LIBRARY.impl("route", _route, key)  # type: ignore[no-untyped-call]
        _LIBRARY.impl("expert_delta", _expert_delta_accelerator, key)  # type: ignore[no-untyped-call]


def _triton_kernels(lora_a: Tensor) -> ModuleType | None:
    """The GPU's kernels. Warns, once, where a GPU has to do without."""
    if not current_platform.is_cuda():
        return None
    from . import triton_delta

    rank, dtype = len(lora_a), lora_a.dtype
    if triton_delta.supports(rank, dtype):
        return triton_delta
    logger.warning(
        "No kernel for experts of rank %d in %s (there are some for ranks %s): dense torch takes its place, "
        "whose cost grows with --alter-max-domains.",
        rank,
        dtype,
        ", ".join(map(str, triton_delta.RANKS)),
    )
    return None


def _route(hidden_states: Tensor, residual: Tensor | None) -> Tensor:
    assert _gate is not None, "alter::route ran before installation"
    routes = _gate.route(hidden_states, residual)
    return routes if _triton is None else _triton.plan(routes)


def _route_fake(hidden_states: Tensor, residual: Tensor | None) -> Tensor:
    assert _gate is not None
    num_tokens = hidden_states.shape[0]
    if hidden_states.device.type == "cpu":
        size = plan.plan_size(num_tokens, _gate.config.top_k)
        return hidden_states.new_empty(size, dtype=torch.int32)
    if _triton is not None:
        shape = _triton.plan_shape(num_tokens, _gate.num_experts)
        return hidden_states.new_empty(shape, dtype=torch.int32)
    return hidden_states.new_empty((num_tokens, _gate.num_experts), dtype=torch.float32)


def _expert_delta_fake(y: Tensor, x: Tensor, routes: Tensor, site_name: str) -> None:
    return None


def _expert_delta_grouped(y: Tensor, x: Tensor, routes: Tensor, site_name: str) -> None:
    """For each routed expert its tokens only; nothing at all when the plan is empty."""
    if int(routes[0]) == 0:
        return
    assert _gate is not None
    site = _sites[site_name]
    for expert, tokens, weights in plan.unpack(routes):
        shrunk = x.index_select(0, tokens) @ site.lora_a.T
        gated = (shrunk * (weights * _gate.scaling).unsqueeze(-1)).to(x.dtype)
        y.index_add_(0, tokens, gated @ site.lora_b[expert])


def _expert_delta_accelerator(y: Tensor, x: Tensor, routes: Tensor, site_name: str) -> None:
    """Fixed shapes and no host synchronisation; in torch, one shrink and one product over all slots."""
    assert _gate is not None
    site = _sites[site_name]
    if _triton is not None:
        _triton.add_expert_delta(y, x, routes, site.lora_a, site.lora_b, _gate.scaling)
        return
    shrunk_TR = x @ site.lora_a.T
    gated_TER = (routes.unsqueeze(-1) * _gate.scaling * shrunk_TR.unsqueeze(1)).to(x.dtype)
    y.addmm_(gated_TER.flatten(1), site.lora_b.flatten(0, 1))


for _schema in (
    "route(Tensor hidden_states, Tensor? residual) -> Tensor",
    "expert_delta(Tensor(a!) y, Tensor x, Tensor routes, str site_name) -> ()",
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
torch.library.register_fake("alter::route", _route_fake, lib=_LIBRARY)
torch.library.register_fake("alter::expert_delta", _expert_delta_fake, lib=_LIBRARY)
