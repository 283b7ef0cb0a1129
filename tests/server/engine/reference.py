"""The transformers reference that the engine is held against."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alter_core import ForgetExpert, Substrate
from alter_core.attach import AttachedModel
from tests.support.engine_run import Route
from tests.support.tiny import TinyBundles, load_model

VOCAB_SIZE = 512
_TIE = 1e-2
"""Logits: five times what half-precision tables may round one by."""


def random_prompts(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Token id lists of unequal lengths around `length`."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randint(3, VOCAB_SIZE, (length + 7 * index,), generator=generator).tolist()
        for index in range(count)
    ]


class Reference:
    """The same bundles on a transformers model."""

    def __init__(self, bundles: TinyBundles, names: list[str]) -> None:
        substrate = Substrate.read(bundles.substrate)
        experts = [ForgetExpert.read(bundles.experts[name], substrate) for name in names]
        self.model = load_model(bundles.model)
        self.attached = AttachedModel(self.model, substrate, experts)

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Log-probability of every token but the first."""
        ids = torch.tensor([tokens])
        logits = self.model(input_ids=ids).logits[0, :-1].float()
        return torch.log_softmax(logits, dim=-1).gather(1, ids[0, 1:, None]).squeeze(1)

    @torch.inference_mode()
    def experts(self, tokens: list[int]) -> list[int]:
        """Index of the expert with the largest weight by token; -1 where the base weights apply alone."""
        self.model(input_ids=torch.tensor([tokens]))
        assert self.attached.routing is not None
        weights = self.attached.routing.weights[0]
        if not self.attached.substrate.retain_lora_b:
            weights = weights.clone()
            weights[:, 0] = 0
        best = weights.max(dim=1)
        return torch.where(best.values > 0, best.indices, -1).tolist()

    def assert_routes(self, actual: Sequence[Route], tokens: list[int]) -> None:
        """Every token went to its expert; where two are closer than the tables resolve, to either."""
        expected = self.experts(tokens)
        assert self.attached.routing is not None
        logits = self.attached.routing.domain_logits[0]
        best_two = torch.nn.functional.pad(logits, (1, 0)).topk(2, dim=-1).values
        is_tie = (best_two[:, 0] - best_two[:, 1] < _TIE).tolist()
        wrong = {r.position: r.expert for r in actual if r.expert != expected[r.position]}
        assert not {p: (e, expected[p]) for p, e in wrong.items() if not is_tie[p]}
        assert len(wrong) <= 0.02 * len(actual)
