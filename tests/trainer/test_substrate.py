from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alter_core.config import AlterConfig
from alter_core.rows import read_rows
from trainer import SilentReporter, SubstrateSettings
from trainer.base_model import BaseModel
from trainer.dataset import encode_rows
from trainer.substrate import (
    SubstrateText,
    area_under_curve,
    initial_substrate,
    measure_text,
    train_estimator,
)

from .world import World


def test_estimator_is_better_than_chance_on_rows_that_took_no_part(
    world: World, base: BaseModel
) -> None:
    rows = {
        part: encode_rows(read_rows([path]), base.tokenizer, max_tokens=128)
        for part, path in world.files.items()
    }
    text = SubstrateText(
        forget={"red": rows["red"]}, retain=rows["retain"], general=rows["general"]
    )
    config = AlterConfig(tap_layer=1, entropy_threshold=0.3)
    substrate = initial_substrate(base, config, seed=0)
    passed = measure_text(base, substrate, text)
    with SilentReporter().stage("estimator", 300) as stage:
        figures = train_estimator(
            substrate, passed, SubstrateSettings(estimator_steps=300), seed=2, stage=stage
        )
    assert figures["held_out_tokens"] > 20
    assert figures["auc"] > 0.75
    assert figures["agreement"] > 0.75


def test_substrate_is_drawn_by_its_seed(base: BaseModel) -> None:
    config = AlterConfig(tap_layer=1, retain_expert="trained")
    first, again, other = (initial_substrate(base, config, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(first.lora_a[s], again.lora_a[s]) for s in first.sites)
    assert not any(torch.equal(first.lora_a[s], other.lora_a[s]) for s in first.sites)
    assert torch.equal(first.estimator.fc1.weight, again.estimator.fc1.weight)
    assert not any(bool(tensor.any()) for tensor in first.retain_lora_b.values())
    assert first.retain_lora_b.keys() == first.sites.keys()


@given(
    st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=30),
)
def test_area_under_curve_equals_counting_pairs(scored: list[tuple[int, bool]]) -> None:
    positive = [score for score, is_positive in scored if is_positive]
    negative = [score for score, is_positive in scored if not is_positive]
    found = area_under_curve(
        torch.tensor([float(score) for score, _ in scored]),
        torch.tensor([is_positive for _, is_positive in scored]),
    )
    if not positive or not negative:
        assert found is None
        return
    wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    assert found == pytest.approx(wins / len(positive) / len(negative))
