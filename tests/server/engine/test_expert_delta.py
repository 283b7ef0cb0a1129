"""`alter::expert_delta` on a CPU, compiled and in torch, against the reference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from alter_core.delta import multi_expert_delta
from server.engine import native, ops, plan
from server.engine.slots import SiteSlots

SCALING = 2.0
TOP_K = 3
NUM_EXPERTS = 6
SITE = "layers.0.qkv"

Delta = Callable[[Tensor, Tensor, Tensor], None]


class _Scaled:
    """The part of a gate that the operators read."""

    scaling = SCALING


def _site(rank: int, in_features: int, out_features: int, dtype: torch.dtype) -> SiteSlots:
    generator = torch.Generator().manual_seed(rank)
    lora_a = torch.randn(rank, in_features, generator=generator) * in_features**-0.5
    lora_b = torch.randn(NUM_EXPERTS, rank, out_features, generator=generator)
    return SiteSlots(
        name=SITE, linear=torch.nn.Identity(), lora_a=lora_a.to(dtype), lora_b=lora_b.to(dtype)
    )


@pytest.fixture(params=["compiled", "torch"])
def delta(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Delta:
    """The operator of a bound site, in both of its forms."""
    if request.param == "compiled":
        assert native.load(), "the kernels do not compile here"

        def compiled(y: Tensor, x: Tensor, routes: Tensor) -> None:
            torch.ops.alter.expert_delta(y, x, routes, SITE)

        ops._register()
        return compiled

    def in_torch(y: Tensor, x: Tensor, routes: Tensor) -> None:
        ops._expert_delta_grouped(y, x, routes, SITE)

    return in_torch


@pytest.fixture
def bind(monkeypatch: pytest.MonkeyPatch) -> Callable[[SiteSlots], None]:
    """Binds a site for one test."""

    def bound(site: SiteSlots) -> None:
        monkeypatch.setattr(ops, "_gate", _Scaled())
        monkeypatch.setattr(ops, "_sites", {SITE: site})
        torch.ops.alter_cpu.clear_sites()
        torch.ops.alter_cpu.set_site(SITE, site.lora_a, site.lora_b, SCALING)

    return bound


def _weights(num_tokens: int, *, seed: int = 0) -> Tensor:
    """Tokens without an expert, with one, and with several."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.zeros(num_tokens, NUM_EXPERTS)
    for token in range(num_tokens):
        count = (0, 1, 1, 3)[token % 4] if num_tokens > 1 else 1
        chosen = torch.randperm(NUM_EXPERTS, generator=generator)[:count]
        weights[token, chosen] = torch.rand(count, generator=generator) + 0.1
    return weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("rank", "in_features", "out_features", "num_tokens"),
    [(8, 64, 96, 1), (8, 256, 640, 70), (1, 48, 80, 5), (3, 37, 53, 9), (64, 128, 33, 130)],
)
def test_equals_the_reference(
    rank: int,
    in_features: int,
    out_features: int,
    num_tokens: int,
    dtype: torch.dtype,
    delta: Delta,
    bind: Callable[[SiteSlots], None],
) -> None:
    site = _site(rank, in_features, out_features, dtype)
    bind(site)
    weights = _weights(num_tokens)
    x = torch.randn(num_tokens, in_features, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = torch.zeros(num_tokens, out_features, dtype=dtype)
    delta(y, x, plan.pack(weights, TOP_K))
    expected = multi_expert_delta(
        x.float(), site.lora_a.float(), site.lora_b.float().mT, weights, SCALING
    )
    error = (y.float() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    assert (y[weights.sum(dim=1) == 0] == 0).all(), "tokens without an expert are left alone"


def test_an_empty_plan_changes_no_bit(delta: Delta, bind: Callable[[SiteSlots], None]) -> None:
    bind(_site(8, 64, 96, torch.bfloat16))
    x, y = torch.randn(5, 64).bfloat16(), torch.randn(5, 96).bfloat16()
    before = y.clone()
    delta(y, x, plan.pack(torch.zeros(5, NUM_EXPERTS), TOP_K))
    assert torch.equal(y, before)


def test_rows_may_be_strided(delta: Delta, bind: Callable[[SiteSlots], None]) -> None:
    """vLLM hands over views into larger buffers."""
    bind(_site(8, 64, 96, torch.bfloat16))
    wide_x, wide_y = torch.randn(6, 128).bfloat16(), torch.randn(6, 200).bfloat16()
    routes = plan.pack(_weights(6), TOP_K)
    expected, outside = wide_y[:, :96].clone(), wide_y[:, 96:].clone()
    delta(expected, wide_x[:, :64].contiguous(), routes)
    delta(wide_y[:, :96], wide_x[:, :64], routes)
    assert torch.equal(wide_y[:, :96], expected)
    assert torch.equal(wide_y[:, 96:], outside)


def test_a_token_does_not_depend_on_its_batch(bind: Callable[[SiteSlots], None]) -> None:
    assert native.load()
    ops._register()
    bind(_site(8, 256, 640, torch.bfloat16))
    weights = _weights(70)
    x = torch.randn(70, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    together = torch.zeros(70, 640, dtype=torch.bfloat16)
    torch.ops.alter.expert_delta(together, x, plan.pack(weights, TOP_K), SITE)
    for token in range(70):
        alone = torch.zeros(1, 640, dtype=torch.bfloat16)
        routes = plan.pack(weights[token : token + 1], TOP_K)
        torch.ops.alter.expert_delta(alone, x[token : token + 1], routes, SITE)
        assert torch.equal(alone[0], together[token])


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (torch.zeros(2, 63).bfloat16(), torch.zeros(2, 96).bfloat16(), "takes 64 features"),
        (torch.zeros(2, 64), torch.zeros(2, 96), "another type"),
    ],
)
def test_wrong_tensors_are_refused(
    x: Tensor, y: Tensor, message: str, bind: Callable[[SiteSlots], None]
) -> None:
    assert native.load()
    ops._register()
    bind(_site(8, 64, 96, torch.bfloat16))
    with pytest.raises(RuntimeError, match=message):
        torch.ops.alter.expert_delta(y, x, plan.pack(_weights(2), TOP_K), SITE)


def test_a_plan_gives_back_what_was_packed() -> None:
    weights = _weights(50)
    routes = plan.pack(weights, TOP_K)
    assert len(routes) == plan.plan_size(50, TOP_K)
    assert torch.equal(plan.dense(routes, num_tokens=50, num_experts=NUM_EXPERTS), weights)
    assert [expert for expert, _, _ in plan.unpack(routes)] == list(range(NUM_EXPERTS))
