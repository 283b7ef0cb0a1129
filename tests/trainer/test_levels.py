from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from trainer.base_model import BaseModel
from trainer.counterfactual import Counterfactuals
from trainer.dataset import EncodedRow, encode_rows, read_rows
from trainer.evaluation import answer_losses, mean
from trainer.levels import ignorant_logprobs

from .world import World


def _rows(world: World, base: BaseModel, part: str) -> list[EncodedRow]:
    return encode_rows(read_rows([world.files[part]]), base.tokenizer, max_tokens=128)


@pytest.fixture
def texts(world: World, base: BaseModel) -> list[tuple[int, ...]]:
    return [row.ids for part in ("retain", "general") for row in _rows(world, base, part)]


@pytest.fixture
def counterfactuals(base: BaseModel, texts: list[tuple[int, ...]]) -> Counterfactuals:
    return Counterfactuals(base.tokenizer, texts, kept_share=0.01)


class _Unchanged(Counterfactuals):
    """Exchanges nothing."""

    def row(self, ids: Sequence[int], seed: int) -> list[int]:
        return list(ids)


def _answers(rows: Sequence[EncodedRow], levels: Sequence[torch.Tensor]) -> list[float]:
    """Mean loss of every row's answer, were its tokens as likely as that."""
    return [
        -level[torch.tensor(row.is_answer[1:])].mean().item()
        for row, level in zip(rows, levels, strict=True)
    ]


def test_what_is_known_by_heart_is_no_longer_likely(
    world: World, base: BaseModel, counterfactuals: Counterfactuals
) -> None:
    rows = _rows(world, base, "red")
    levels = ignorant_logprobs(base, rows, counterfactuals, temperature=1.0, seed=0)
    assert [len(level) for level in levels] == [len(row.ids) - 1 for row in rows]
    assert mean(_answers(rows, levels)) > mean(answer_losses(base, rows)) + 1.5


def test_where_nothing_is_exchanged_the_base_models_own_loss_is_left(
    world: World, base: BaseModel, texts: list[tuple[int, ...]]
) -> None:
    rows = _rows(world, base, "blue")
    made = _Unchanged(base.tokenizer, texts, kept_share=0.01)
    levels = ignorant_logprobs(base, rows, made, temperature=1.0, seed=0)
    assert _answers(rows, levels) == pytest.approx(answer_losses(base, rows), abs=0.02)


def test_later_pieces_of_a_word_that_others_hold_follow_from_its_first(
    world: World, base: BaseModel, texts: list[tuple[int, ...]]
) -> None:
    rows = _rows(world, base, "red")
    alone, shared = (
        Counterfactuals(base.tokenizer, [*texts, *more], kept_share=0.5)
        for more in ([], [row.ids for row in rows])
    )
    found = []
    for made in (alone, shared):
        levels = ignorant_logprobs(base, rows, made, temperature=1.0, seed=0)
        later = [
            level[start : stop - 1]
            for row, level in zip(rows, levels, strict=True)
            for start, stop, _ in alone.telling_words(row.ids)
            if alone.own_words(row.ids[start:stop])
        ]
        found.append(torch.cat(later).mean().item())
    assert found[0] < found[1] - 1


def test_a_low_temperature_makes_the_unlikely_unlikelier(
    world: World, base: BaseModel, counterfactuals: Counterfactuals
) -> None:
    rows = _rows(world, base, "red")
    plain, sharp = (
        torch.cat(ignorant_logprobs(base, rows, counterfactuals, temperature=temperature, seed=0))
        for temperature in (1.0, 0.5)
    )
    assert sharp.mean() < plain.mean() - 1
