"""Router logits of the compiled tables against the bank in torch, under what a scheduler does."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from alter_core import AlterConfig, EvidenceHead
from alter_core.errors import EngineError
from alter_core.evidence import NO_EVIDENCE, windowed_max
from alter_core.router import expert_weights
from server.engine import evidence_tables, native
from server.engine.evidence_bank import EvidenceBank, StepTokens
from server.engine.evidence_tables import TableEvidenceBank

VOCAB, SIZE = 300, 32
MAX_LENGTH = 200
EMBEDDING = torch.randn(VOCAB, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _kernels() -> None:
    assert native.load(), "the kernels do not compile here"


def _head(seed: int, config: AlterConfig) -> EvidenceHead:
    torch.manual_seed(seed)
    head = EvidenceHead(SIZE, ngram=config.evidence_ngram, num_units=config.evidence_units)
    return head.requires_grad_(False)


def _config(**settings: int) -> AlterConfig:
    return AlterConfig(tap_layer=1, **({"evidence_window": 16} | settings))  # type: ignore[arg-type]


def _tables(config: AlterConfig, *, max_tokens: int = 128) -> TableEvidenceBank:
    return TableEvidenceBank(
        config, EMBEDDING.__getitem__, vocab_size=VOCAB, max_domains=4, max_tokens=max_tokens
    )


class _Requests:
    """Requests of random tokens that a scheduler might compute."""

    def __init__(self, count: int, seed: int = 0) -> None:
        self.ids = np.random.default_rng(seed).integers(
            0, VOCAB, (count, MAX_LENGTH), dtype=np.int32
        )

    def step(self, spans: Sequence[tuple[int, int, int]]) -> StepTokens:
        """Of (request, first position, number of tokens)."""
        requests, starts, counts = np.array(spans, dtype=np.int64).T.copy()
        return StepTokens(
            request_ids=[f"request-{request}" for request in requests],
            token_ids=self.ids[requests],
            starts=starts,
            counts=counts,
        )


STEPS = {
    "prefill": [[(0, 0, 50), (1, 0, 7), (2, 0, 1)]],
    "decode": [[(0, 0, 5), (1, 0, 9)], *([(0, 5 + i, 1), (1, 9 + i, 1)] for i in range(60))],
    "chunks": [[(0, 0, 30), (1, 0, 3)], [(0, 30, 30), (1, 3, 1)], [(0, 60, 9), (1, 4, 40)]],
    "cache hit": [[(0, 0, 20)], [(0, 20, 1), (1, 48, 5), (2, 3, 1)]],
    "recomputed": [[(0, 0, 40), (1, 0, 5)], [(0, 40, 1), (1, 5, 1)], [(0, 0, 41), (1, 6, 1)]],
    "absent": [
        [(0, 0, 9), (1, 0, 9)],
        [(1, 9, 1)],
        [(1, 10, 1), (2, 0, 4)],
        [(0, 9, 1), (2, 4, 1)],
    ],
    "reordered": [
        [(0, 0, 9), (1, 0, 9), (2, 0, 9)],
        [(2, 9, 1), (0, 9, 1)],
        [(0, 10, 3), (2, 10, 1)],
    ],
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"evidence_window": 1}, {"evidence_ngram": 1}, {"evidence_units": 24}],
    ids=["default", "no-window", "unigrams", "padded-units"],
)
def test_logits_equal_those_in_torch(
    steps: list[list[tuple[int, int, int]]], settings: dict[str, int]
) -> None:
    config, requests = _config(**settings), _Requests(3)
    tables = _tables(config)
    plain = EvidenceBank(config, EMBEDDING.__getitem__, torch.device("cpu"))
    for bank in (tables, plain):
        for expert in (4, 1, 2):
            bank.set_head(expert, _head(expert, config))
    assert tables.experts.tolist() == plain.experts.tolist() == [1, 2, 4]
    for spans in steps:
        step = requests.step(spans)
        torch.testing.assert_close(
            tables.step_logits(step), plain.step_logits(step), atol=2e-3, rtol=1e-3
        )


def test_logits_equal_the_definition() -> None:
    config, requests = _config(), _Requests(1)
    tables, head = _tables(config), _head(1, config)
    tables.set_head(1, head)
    expected = windowed_max(head(EMBEDDING[requests.ids[0]]).unsqueeze(-1), config.evidence_window)
    found = [tables.step_logits(requests.step([(0, 0, 70)]))]
    found += [tables.step_logits(requests.step([(0, position, 1)])) for position in range(70, 200)]
    torch.testing.assert_close(torch.cat(found), expected, atol=2e-3, rtol=1e-3)


def test_heads_come_and_go() -> None:
    config, requests = _config(), _Requests(2)
    tables, plain = (
        _tables(config),
        EvidenceBank(config, EMBEDDING.__getitem__, torch.device("cpu")),
    )
    spans = [(0, 0, 30), (1, 0, 30)]
    changes = [(1, 1), (3, 3), (1, None), (2, 2), (3, 7), (2, None), (3, None)]
    for at, (expert, seed) in enumerate(changes):
        head = None if seed is None else _head(seed, config)
        if head is not None:
            tables.prepare(head)
        for bank in (tables, plain):
            bank.set_head(expert, head)
        step = requests.step([(q, start + 30 * (at > 0) + at, count) for q, start, count in spans])
        torch.testing.assert_close(
            tables.step_logits(step), plain.step_logits(step), atol=2e-3, rtol=1e-3
        )


def test_full_tables_start_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for 60 of 300 tokens: cleared again and again, and a step too large is split."""
    monkeypatch.setattr(evidence_tables, "EVIDENCE_CACHE_BYTES", 0)
    config, requests = _config(), _Requests(8)
    tables = _tables(config, max_tokens=60 - 16 - 5)
    plain = EvidenceBank(config, EMBEDDING.__getitem__, torch.device("cpu"))
    for bank in (tables, plain):
        bank.set_head(1, _head(1, config))
        bank.set_head(2, _head(2, config))
    whole = [(q, 0, 30) for q in range(8)]
    for spans in (whole, *([(q, 30 + i, 1) for q in range(8)] for i in range(20))):
        step = requests.step(spans)
        torch.testing.assert_close(
            tables.step_logits(step), plain.step_logits(step), atol=2e-3, rtol=1e-3
        )
    staged = _head(3, config)
    tables.prepare(staged)
    tables.step_logits(requests.step([(q, 60, 4) for q in range(8)]))
    for bank in (tables, plain):
        bank.set_head(3, staged)
    step = requests.step([(q, 64, 2) for q in range(8)])
    torch.testing.assert_close(
        tables.step_logits(step), plain.step_logits(step), atol=2e-3, rtol=1e-3
    )
    text = requests.ids[0]
    assert len(np.unique(text)) > 60
    torch.testing.assert_close(
        tables._text_scores(text), plain._text_scores(text), atol=2e-3, rtol=1e-3
    )


TOLERANCE = 2**-8


def _bank(kind: str, config: AlterConfig) -> EvidenceBank:
    if kind == "tables":
        return _tables(config)
    return EvidenceBank(config, EMBEDDING.__getitem__, torch.device("cpu"))


def _head_below(highest: float, seed: int, config: AlterConfig, text: Tensor) -> EvidenceHead:
    """A head whose best token of the text has this score."""
    head = _head(seed, config)
    head.fc2.bias.data += highest - head(EMBEDDING[text]).max()
    return head


@pytest.mark.parametrize("kind", ["tables", "torch"])
def test_an_expert_touches_a_text_with_its_first_evidence(kind: str) -> None:
    config = _config()
    bank = _bank(kind, config)
    text: NDArray[np.int32] = _Requests(1).ids[0]
    shy = _head_below(-1.0, 1, config, torch.from_numpy(text))
    bold = _head(2, config)
    best = bold(EMBEDDING[text]).topk(2)
    bold.fc2.bias.data -= best.values.mean()  # one token alone is left above zero
    bank.set_head(1, shy)
    bank.set_head(2, bold)
    assert bank.touches(2, text, tolerance=TOLERANCE)
    assert bank.touches(2, text[: best.indices[0] + 1], tolerance=TOLERANCE)
    assert not bank.touches(2, text[: best.indices[0]], tolerance=TOLERANCE)
    assert not bank.touches(1, text[: best.indices[0]], tolerance=TOLERANCE)


@pytest.mark.parametrize("kind", ["tables", "torch"])
@pytest.mark.parametrize("best_other", [-0.5, 0.5, 3.0])
def test_an_expert_that_does_not_touch_a_text_changes_no_weight(
    kind: str, best_other: float
) -> None:
    """Its own evidence goes from far below to just above what counts."""
    config = _config()
    text: NDArray[np.int32] = _Requests(1).ids[0]
    ids = torch.from_numpy(text)
    answers, changes = [], []
    for highest in np.arange(-8.0, 0.5, 0.25):
        bank = _bank(kind, config)
        heads = [_head_below(h, seed, config, ids) for seed, h in enumerate((best_other, -2.0))]
        heads.insert(1, _head_below(float(highest), 7, config, ids))
        for expert, head in enumerate(heads):
            bank.set_head(1 + expert, head)
        answers.append(bank.touches(2, text, tolerance=TOLERANCE))
        logits = windowed_max(bank._text_scores(text), config.evidence_window)
        changes.append(_largest_change(logits, 1, config))
    assert answers == sorted(answers), "more evidence touches more"
    assert not answers[0]
    assert answers[-1]
    for is_touched, change in zip(answers, changes, strict=True):
        assert is_touched or change <= TOLERANCE
    assert max(changes) > 10 * TOLERANCE


def _largest_change(logits: Tensor, column: int, config: AlterConfig) -> float:
    """Of any weight on either path of Eq. 9, with and without one domain."""
    without = logits.clone()
    without[:, column] = NO_EVIDENCE
    return max(
        float(
            (expert_weights(logits, path, config) - expert_weights(without, path, config))
            .abs()
            .max()
        )
        for path in (
            torch.zeros(len(logits), dtype=torch.bool),
            torch.ones(len(logits), dtype=torch.bool),
        )
    )


def test_a_head_beyond_half_precision_is_refused() -> None:
    config, requests = _config(), _Requests(1)
    tables, head = _tables(config), _head(1, config)
    tables.set_head(2, _head(2, config))
    tables.step_logits(requests.step([(0, 0, 20)]))
    head.fc1.weight.data *= 1e6
    with pytest.raises(EngineError, match="too large"):
        tables.prepare(head)
