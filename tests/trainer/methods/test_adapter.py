"""Which adapter matrices learn, and how fast."""

from __future__ import annotations

import pytest
import torch

from alter_core.errors import ConfigError
from tests.trainer.world import make_model
from trainer.methods import ADAPTERS, LoraAdapter

NUM_LINEARS = 3 * 7
"""q, k, v, o, gate, up and down of three layers."""


def _learned(adapter: LoraAdapter) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    model = make_model(64)
    adapter.attach(model)
    named = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return named, adapter.learning_rates(model, 1e-3)


def test_lora_learns_a_and_b_at_one_rate() -> None:
    named, rates = _learned(ADAPTERS["lora"])
    assert sum(".lora_A." in name for name in named) == NUM_LINEARS
    assert sum(".lora_B." in name for name in named) == NUM_LINEARS
    assert len(named) == 2 * NUM_LINEARS
    assert set(rates.values()) == {1e-3}


def test_asymlora_learns_a_at_a_hundredth_of_bs_rate() -> None:
    named, rates = _learned(ADAPTERS["asymlora"])
    assert set(rates) == {name for name in named if ".lora_A." in name}
    assert list(rates.values()) == pytest.approx([1e-5] * NUM_LINEARS)


def test_a_ratio_of_0_freezes_a_as_it_was_drawn() -> None:
    named, _ = _learned(LoraAdapter(a_rate_ratio=0.0))
    assert len(named) == NUM_LINEARS
    assert all(".lora_B." in name for name in named)


@pytest.mark.parametrize("setting", [{"rank": 0}, {"lora_alpha": 0.0}, {"a_rate_ratio": -0.1}])
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        LoraAdapter(**setting)
