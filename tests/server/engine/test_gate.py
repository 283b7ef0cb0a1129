"""The gate of a CPU, compiled, against the one in torch."""

from __future__ import annotations

import pytest
import torch

from alter_core import AlterConfig, EvidenceHead, Substrate
from server.engine import native, plan
from server.engine.evidence_bank import EvidenceBank
from server.engine.gate import Gate
from tests.support.tiny import random_substrate, save_model

NUM_EXPERTS = 8
EXPERTS = [2, 3, 5, 6]
NUM_TOKENS, NUM_PADDED = 300, 320


@pytest.fixture(scope="module", params=["identity", "trained"])
def substrate(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Substrate:
    config = AlterConfig(tap_layer=1, rank=8, retain_expert=request.param, top_k=2)
    return random_substrate(save_model(tmp_path_factory.mktemp("model")), config)


def _gate(substrate: Substrate, *, is_native: bool) -> Gate:
    bank = EvidenceBank(substrate.config, lambda ids: ids, torch.device("cpu"))
    gate = Gate(
        substrate,
        bank,
        num_experts=NUM_EXPERTS,
        max_tokens=NUM_PADDED,
        device=torch.device("cpu"),
        is_native=is_native,
    )
    gate._experts = torch.tensor(EXPERTS)
    generator = torch.Generator().manual_seed(5)
    gate._step_logits = torch.randn(NUM_TOKENS, len(EXPERTS), generator=generator) - 0.7
    gate._step_logits[::7] = -1.0  # nothing beats retain
    gate._step_logits[1::7] = torch.tensor([0.5, 300.0, 0.2, -4.0])  # weights that underflow
    if not is_native:
        gate._fill_buffers(NUM_TOKENS, NUM_PADDED)
    return gate


@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_routes_equal_those_in_torch(
    substrate: Substrate, dtype: torch.dtype, has_residual: bool
) -> None:
    assert native.load(), "the kernels do not compile here"
    generator = torch.Generator().manual_seed(6)
    size = substrate.base_model.hidden_size
    hidden = torch.randn(NUM_PADDED, size, generator=generator).to(dtype)
    residual = (
        torch.randn(NUM_PADDED, size, generator=generator).to(dtype) if has_residual else None
    )
    found = {}
    for is_native in (True, False):
        gate = _gate(substrate, is_native=is_native)
        routes = gate.route(hidden, residual)
        weights = plan.dense(routes, num_tokens=NUM_PADDED, num_experts=NUM_EXPERTS)
        found[is_native] = weights, torch.tensor(gate.routed_tokens())
    torch.testing.assert_close(found[True][0], found[False][0], atol=1e-6, rtol=1e-5)
    assert torch.equal(found[True][1], found[False][1])
    weights, counts = found[True]
    assert (weights[NUM_TOKENS:] == 0).all(), "padding is not routed"
    assert (weights[::7, 1:] == 0).all()
    assert (counts[[0, *EXPERTS]] > 0).all(), "not every expert has tokens on both paths"
    assert weights[:, 0].any() == (substrate.config.retain_expert == "trained")


def test_a_plan_is_as_long_as_its_batch_says(substrate: Substrate) -> None:
    """Compiled graphs rely on it."""
    gate = _gate(substrate, is_native=True)
    routes = gate.route(torch.randn(NUM_PADDED, substrate.base_model.hidden_size), None)
    assert len(routes) == plan.plan_size(NUM_PADDED, substrate.config.top_k)


def test_a_canary_takes_every_token(substrate: Substrate) -> None:
    gate = _gate(substrate, is_native=True)
    gate._experts = gate._canary
    gate._step_logits = torch.full((NUM_TOKENS, 1), 1e3)
    routes = gate.route(torch.randn(NUM_PADDED, substrate.base_model.hidden_size), None)
    weights = plan.dense(routes, num_tokens=NUM_PADDED, num_experts=NUM_EXPERTS)
    assert (weights[:NUM_TOKENS, -1] == 1).all()
    assert not weights[NUM_TOKENS:].any()


def test_a_step_without_requests_routes_nothing(substrate: Substrate) -> None:
    gate = _gate(substrate, is_native=True)
    gate.bank.set_head(1, EvidenceHead(4, ngram=5, num_units=64))
    gate.prepare(None, NUM_PADDED)
    routes = gate.route(torch.randn(NUM_PADDED, substrate.base_model.hidden_size), None)
    assert int(routes[0]) == 0
    assert not any(map(any, gate.routed_tokens()))
