"""The evidence latch against loops that follow its definition word by word."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alter_core import EvidenceHead, windowed_max
from alter_core.evidence import NO_EVIDENCE, ngram_features

NGRAMS = (1, 2, 3, 4)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_ngram(embeddings: list[list[float]], ngram: int) -> list[list[float]]:
    size = len(embeddings[0])
    rows = []
    for t in range(len(embeddings)):
        row: list[float] = []
        for position in range(t - ngram + 1, t + 1):
            row += embeddings[position] if position >= 0 else [0.0] * size
        rows.append(row)
    return rows


def naive_windowed_max(evidence: list[list[float]], window: int) -> list[list[float]]:
    num_domains = len(evidence[0])
    return [
        [
            max(evidence[s][n] for s in range(max(0, t - window + 1), t + 1))
            for n in range(num_domains)
        ]
        for t in range(len(evidence))
    ]


@pytest.mark.parametrize("ngram", NGRAMS)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 7])
def test_ngram_features_are_the_last_embeddings_oldest_first(ngram: int, num_tokens: int) -> None:
    embeddings = random(2, num_tokens, 5)
    features = ngram_features(embeddings, ngram)
    assert features.shape == (2, num_tokens, ngram * 5)
    for b in range(2):
        assert features[b].tolist() == naive_ngram(embeddings[b].tolist(), ngram)


def test_ngram_features_need_no_batch_dimension() -> None:
    embeddings = random(3, 5)
    assert torch.equal(ngram_features(embeddings, 2), ngram_features(embeddings[None], 2)[0])


@pytest.mark.parametrize("ngram", NGRAMS)
def test_evidence_reads_no_later_token_and_none_before_its_ngram(ngram: int) -> None:
    torch.manual_seed(0)
    head = EvidenceHead(5, ngram=ngram, num_units=7)
    embeddings = random(9, 5)
    changed = embeddings.clone()
    changed[4] += 1
    differs = head(embeddings) != head(changed)
    assert not differs[:4].any()
    assert differs[4]
    assert not differs[4 + ngram :].any()


def test_evidence_is_its_formula() -> None:
    torch.manual_seed(0)
    head = EvidenceHead(5, ngram=3, num_units=7)
    embeddings = random(2, 4, 5)
    scores = head(embeddings)
    assert scores.shape == (2, 4)
    w1, b1 = head.fc1.weight.tolist(), head.fc1.bias.tolist()
    w2, b2 = head.fc2.weight[0].tolist(), head.fc2.bias.item()
    for b in range(2):
        for t, features in enumerate(naive_ngram(embeddings[b].tolist(), 3)):
            units = [
                max(0.0, sum(w * f for w, f in zip(row, features, strict=True)) + bias)
                for row, bias in zip(w1, b1, strict=True)
            ]
            expected = sum(w * u for w, u in zip(w2, units, strict=True)) + b2
            assert scores[b, t].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_evidence_of_bf16_embeddings_is_float32() -> None:
    torch.manual_seed(0)
    head = EvidenceHead(5, ngram=2, num_units=7)
    embeddings = random(3, 5).bfloat16()
    assert head(embeddings).dtype is torch.float32
    assert torch.equal(head(embeddings), head(embeddings.float()))


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2**16))
def test_windowed_max_is_the_maximum_over_the_window(
    num_tokens: int, window: int, seed: int
) -> None:
    evidence = random(2, num_tokens, 3, seed=seed)
    result = windowed_max(evidence, window)
    assert result.shape == evidence.shape
    for b in range(2):
        assert result[b].tolist() == naive_windowed_max(evidence[b].tolist(), window)


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 16, 31, 32, 33])
def test_a_single_hit_latches_for_exactly_the_window(window: int) -> None:
    evidence = torch.full((40, 1), -1.0)
    evidence[4] = 2.0
    fired = (windowed_max(evidence, window) > 0).flatten().nonzero().flatten().tolist()
    assert fired == list(range(4, min(4 + window, 40)))


def test_a_window_of_1_is_the_evidence_itself() -> None:
    evidence = random(7, 3)
    assert torch.equal(windowed_max(evidence, 1), evidence)


def test_a_window_beyond_the_text_is_a_running_maximum() -> None:
    evidence = random(2, 7, 3)
    assert torch.equal(windowed_max(evidence, 100), evidence.cummax(dim=-2).values)


def test_windowed_max_leaves_its_input_alone() -> None:
    evidence = random(7, 3)
    before = evidence.clone()
    windowed_max(evidence, 4)
    assert torch.equal(evidence, before)


def test_windowed_max_of_padding_is_no_evidence() -> None:
    """All that the window sees is masked: the logit stays finite and below retain's 0."""
    assert (windowed_max(torch.full((6, 2), NO_EVIDENCE), 3) == NO_EVIDENCE).all()
    assert -float("inf") < NO_EVIDENCE < 0


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**16))
def test_the_logit_is_a_function_of_the_last_window_plus_ngram_tokens(
    window: int, ngram: int, seed: int
) -> None:
    """What makes the gate exact under chunked prefill, prefix caching and preemption."""
    torch.manual_seed(seed)
    head = EvidenceHead(5, ngram=ngram, num_units=7)
    text = random(15, 5, seed=seed)
    other_start = text.clone()
    reach = window + ngram - 1
    other_start[: 15 - reach] = random(15 - reach, 5, seed=seed + 1)
    last = [windowed_max(head(e).unsqueeze(-1), window)[-1] for e in (text, other_start)]
    assert torch.equal(last[0], last[1])


@given(st.integers(1, 8), st.integers(1, 14), st.integers(0, 2**16))
def test_chunks_joined_over_the_window_give_the_whole(window: int, cut: int, seed: int) -> None:
    evidence = random(15, 2, seed=seed)
    whole = windowed_max(evidence, window)
    start = max(0, cut - window + 1)
    assert torch.equal(windowed_max(evidence[:cut], window), whole[:cut])
    assert torch.equal(windowed_max(evidence[start:], window)[cut - start :], whole[cut:])
