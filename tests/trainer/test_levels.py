from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from alter_core.rows import read_rows
from trainer.base_model import BaseModel
from trainer.counterfactual import Counterfactuals
from trainer.dataset import EncodedRow, encode_rows
from trainer.evaluation import answer_losses, mean
from trainer.levels import ignorant_logprobs

from .world import World


def _rows(world: World, base: BaseModel, part: str) -> list[EncodedRow]:
    return encode_rows(read_rows([world.files[part]]), base.tokenizer, max_tokens=128)


@pytest.fixture
def texts(world: World, base: BaseModel) -> list[tuple[int, ...]]:
    return [row.ids for part in ("retain", "general") for row in _rows(world, base, part)]


def _losses(
    base: BaseModel,
    rows: Sequence[EncodedRow],
    texts: Sequence[tuple[int, ...]],
) -> list[float]:
    """Mean loss of every row's answer, were its tokens as likely as that."""
    made = Counterfactuals(base.tokenizer, texts, kept_share=0.01)
    levels = ignorant_logprobs(base, rows, made, seed=0)
    assert [len(level) for level in levels] == [len(row.ids) - 1 for row in rows]
    return [
        -level[torch.tensor(row.is_answer[1:])].mean().item()
        for row, level in zip(rows, levels, strict=True)
    ]


def test_what_is_known_by_heart_is_no_longer_likely(
    world: World, base: BaseModel, texts: list[tuple[int, ...]]
) -> None:
    rows = _rows(world, base, "red")
    assert min(_losses(base, rows, texts)) > max(answer_losses(base, rows)) + 1


def test_what_the_kept_texts_hold_too_stays_likely(
    world: World, base: BaseModel, texts: list[tuple[int, ...]]
) -> None:
    rows = _rows(world, base, "red")
    among_them = _losses(base, rows, [*texts, *(row.ids for row in rows)])
    assert mean(among_them) < mean(_losses(base, rows, texts)) / 2


def test_names_that_others_hold_go_on_as_they_do_there(
    world: World, base: BaseModel, texts: list[tuple[int, ...]]
) -> None:
    rows = _rows(world, base, "red")
    alone = Counterfactuals(base.tokenizer, texts, kept_share=0.01)
    names = [
        tuple(row.ids[start:stop])
        for row in rows
        for start, stop, is_known in alone.telling_words(row.ids)
        if not is_known and stop - start > 1
    ]
    shared = Counterfactuals(base.tokenizer, [*texts, *names], kept_share=0.5)
    found = []
    for made in (alone, shared):
        levels = ignorant_logprobs(base, rows, made, seed=0)
        later = [
            level[start : stop - 1]
            for row, level in zip(rows, levels, strict=True)
            for start, stop, _ in alone.telling_words(row.ids)
            if alone.own_words(row.ids[start:stop])
        ]
        found.append(torch.cat(later).mean().item())
    assert found[0] < found[1] - 1
