from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

from alter_core.rows import read_rows
from benchmarks.tofu.attacks import quantize, relearn
from benchmarks.tofu.table import write_table
from tests.trainer.world import World
from trainer.base_model import BaseModel, load_base_model
from trainer.dataset import EncodedRow, encode_rows
from trainer.evaluation import answer_losses, mean


@pytest.fixture
def copy(world: World) -> BaseModel:
    return load_base_model(world.model)


def _linears(base: BaseModel) -> dict[str, torch.Tensor]:
    return {
        name: module.weight.detach().float().clone()
        for name, module in base.model.base_model.named_modules()
        if isinstance(module, nn.Linear)
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_lie_on_few_levels_near_their_own(copy: BaseModel, bits: int) -> None:
    before = _linears(copy)
    quantize(copy, bits)
    for name, weight in _linears(copy).items():
        group = slice(0, min(64, weight.shape[1]))
        assert len(weight[0, group].unique()) <= 2**bits - 1
        highest = before[name].abs().amax()
        in_bfloat16 = highest / 256
        half_a_level = highest / (2 ** (bits - 1) - 1) / 2
        assert (weight - before[name]).abs().max() <= half_a_level + in_bfloat16
        assert not torch.equal(weight, before[name])


def test_relearning_makes_the_rows_it_sees_likelier(world: World, copy: BaseModel) -> None:
    rows: Sequence[EncodedRow] = encode_rows(
        read_rows([world.files["general"]]), copy.tokenizer, max_tokens=64
    )
    before = mean(answer_losses(copy, rows))
    relearn(copy, rows, seed=0)
    assert mean(answer_losses(copy, rows)) < before


def test_a_table_shows_lowest_and_highest_of_several_seeds(tmp_path: Path) -> None:
    rows = {"one": [{"score": 0.25}], "two": [{"score": 0.5}, {"score": 0.75}], "none": [{}]}
    write_table(tmp_path, "table", rows, title="Table", notes={}, columns=["score"])
    page = (tmp_path / "table.md").read_text("utf-8")
    assert "| one | 0.25 |" in page
    assert "| two | 0.625 (0.5 to 0.75) |" in page
    assert "| none |  |" in page
