"""Every rank and dtype that can be configured: gate, slots and operator on CPU, without an engine."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from alter_core import (
    AlterConfig,
    BaseModelInfo,
    EntropyEstimator,
    EvidenceHead,
    Substrate,
    multi_expert_delta,
)
from alter_core.evidence import windowed_max
from alter_core.router import expert_weights
from server.engine import native, ops, plan
from server.engine.evidence_bank import EvidenceBank, StepTokens
from server.engine.evidence_tables import TableEvidenceBank
from server.engine.gate import Gate
from server.engine.slots import ExpertSlots

RANKS = (1, 3, 8, 64, 256)
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Absolute, for values of a few units."""
COUNTS = ([1], [1, 1, 1], [7, 40], [33, 1, 5])
"""New tokens by request: decode steps of one and several, prefill, and both at once."""

HIDDEN, IN, OUT, VOCAB, DOMAINS, PADDED = 12, 20, 28, 50, 4, 3
SITE = "layers.1.qkv"


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Installation:
    """What `install` makes of a substrate with one site, around a model that is not there."""

    def __init__(self, rank: int, dtype: torch.dtype, *, is_native: bool) -> None:
        torch.manual_seed(0)
        self.config = AlterConfig(
            tap_layer=1, rank=rank, lora_alpha=2.0 * rank, evidence_window=4, evidence_ngram=2
        )
        self.embeddings = normal(VOCAB, HIDDEN, seed=1)
        estimator = EntropyEstimator(HIDDEN)
        torch.nn.init.constant_(estimator.fc2.bias, self.config.entropy_threshold)
        torch.nn.init.normal_(estimator.fc2.weight)
        self.substrate = Substrate(
            base_model=BaseModelInfo(
                name="none",
                architecture="LlamaForCausalLM",
                hidden_size=HIDDEN,
                num_layers=2,
                vocab_size=VOCAB,
                fingerprint="0" * 64,
            ),
            config=self.config,
            sites={},
            lora_a={},
            retain_lora_b={},
            estimator=estimator.requires_grad_(False),
            embedding_mean=torch.zeros(HIDDEN),
            embedding_std=torch.ones(HIDDEN),
        )
        self.heads = [self._head() for _ in range(DOMAINS)]
        slots = ExpertSlots(max_domains=DOMAINS)
        linear = SimpleNamespace(output_size_per_partition=OUT)
        lora_a = normal(rank, IN, seed=2) * IN**-0.5
        slots.add_site(SITE, linear, lora_a, torch.device("cpu"), dtype)
        self.lora_a = lora_a.to(dtype)
        self.lora_b = (normal(slots.num_experts, OUT, rank, seed=3) * rank**-0.5).to(dtype)
        for expert in range(1, DOMAINS + 1):
            slots.write(expert, {SITE: self.lora_b[expert].T.contiguous()})
        embed = self.embeddings.__getitem__
        bank = (
            TableEvidenceBank(
                self.config, embed, vocab_size=VOCAB, max_domains=DOMAINS, max_tokens=64
            )
            if is_native
            else EvidenceBank(self.config, embed, torch.device("cpu"))
        )
        for expert, head in enumerate(self.heads, start=1):
            bank.set_head(expert, head)
        self.gate = Gate(
            self.substrate,
            bank,
            num_experts=slots.num_experts,
            max_tokens=64,
            device=torch.device("cpu"),
            is_native=is_native,
        )
        self.is_native = is_native
        ops.bind(self.gate, slots.sites)

    def _head(self) -> EvidenceHead:
        """Fires on about one token in eight, so that windows overlap and leave gaps."""
        config = self.config
        head = EvidenceHead(
            HIDDEN, ngram=config.evidence_ngram, num_units=config.evidence_units
        ).requires_grad_(False)
        head.fc2.bias -= head(self.embeddings).quantile(7 / 8)
        head.fc2.weight *= 8
        head.fc2.bias *= 8
        return head

    def run(self, step: StepTokens, hidden: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Weights of a step; adds the delta to `y`. The one place that knows how operators are called."""
        self.gate.prepare(step, hidden.shape[0])
        routes = torch.ops.alter.route(hidden, None)
        delta = torch.ops.alter.expert_delta if self.is_native else ops._expert_delta_grouped
        delta(y, x, routes, SITE)
        return plan.dense(routes, num_tokens=len(hidden), num_experts=DOMAINS + 2)

    def expected_weights(self, step: StepTokens, hidden: Tensor) -> Tensor:
        """By the reference, request by request; zero for padding. Shapes: -> (T, E)."""
        logits = []
        for row, count in zip(step.token_ids, step.counts, strict=True):
            embedded = self.embeddings[torch.from_numpy(row[:count].astype(np.int64))]
            evidence = torch.stack([head(embedded) for head in self.heads], dim=-1)
            logits.append(windowed_max(evidence, self.config.evidence_window))
        joined = torch.cat(logits)
        is_high = self.substrate.estimator(hidden[: len(joined)]) > self.config.entropy_threshold
        weights = torch.zeros(hidden.shape[0], DOMAINS + 2)
        weights[: len(joined), :-1] = expert_weights(joined, is_high, self.config)
        weights[:, 0] = 0  # B_r = 0
        return weights


def make_step(counts: list[int], seed: int) -> StepTokens:
    ids = np.random.default_rng(seed).integers(0, VOCAB, (len(counts), max(counts)), np.int32)
    return StepTokens(
        request_ids=[f"r{index}" for index in range(len(counts))],
        token_ids=ids,
        starts=np.zeros(len(counts), dtype=np.int64),
        counts=np.array(counts, dtype=np.int64),
    )


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("is_native", [True, False], ids=["compiled", "torch"])
def test_every_rank_and_dtype_routes_and_adds_what_the_reference_does(
    is_native: bool, rank: int, dtype: torch.dtype
) -> None:
    assert native.load(), "the kernels do not compile here"
    installation = Installation(rank, dtype, is_native=is_native)
    tolerance = TOLERANCES[dtype]
    numbers_of_experts = set()
    largest = 0.0
    for counts, seed in itertools.product(COUNTS, range(6)):
        step = make_step(counts, seed)
        num_tokens = sum(counts) + PADDED
        hidden = normal(num_tokens, HIDDEN, seed=seed + 10).to(dtype)
        x = normal(num_tokens, IN, seed=seed + 20).to(dtype)
        base = normal(num_tokens, OUT, seed=seed + 30).to(dtype)
        y = base.clone()

        weights = installation.run(step, hidden, x, y)

        torch.testing.assert_close(
            weights, installation.expected_weights(step, hidden), rtol=2e-3, atol=2e-3
        )
        delta = multi_expert_delta(
            x.double(),
            installation.lora_a.double(),
            installation.lora_b.double(),
            weights.double(),
            installation.config.scaling,
        )
        torch.testing.assert_close(y.double(), base.double() + delta, rtol=0, atol=tolerance)
        counted = (weights > 0).sum(dim=1)
        assert torch.equal(y[counted == 0], base[counted == 0]), "an unrouted token changed"
        numbers_of_experts |= set(counted.tolist())
        largest = max(largest, float(delta.abs().max()))
    assert numbers_of_experts >= {0, 1, 2, 3}, "not every kind of route was met"
    assert largest > 20 * tolerance, "the delta is too small to tell anything"
