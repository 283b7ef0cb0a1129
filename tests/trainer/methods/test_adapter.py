"""Which adapter matrices learn, and how fast."""

from __future__ import annotations

import pytest

from alter_core.errors import ConfigError
from tests.trainer.world import make_model
from trainer.methods import ADAPTERS, LoraAdapter

NUM_LINEARS = 3 * 7
"""q, k, v, o, gate, up and down of three layers."""


def _groups(adapter: LoraAdapter) -> dict[float, list[str]]:
    """Names of what learns, by rate."""
    model = make_model(64)
    adapter.attach(model)
    named = {id(value): name for name, value in model.named_parameters() if value.requires_grad}
    groups = {
        group["lr"]: [named.pop(id(value)) for value in group["params"]]
        for group in adapter.groups(model, 1e-3)
    }
    assert not named, "every matrix that learns has a rate"
    return groups


def _kinds(names: list[str]) -> list[str]:
    return [name.split(".lora_")[1][0] for name in names]


def test_lora_learns_a_and_b_at_one_rate() -> None:
    model = make_model(64)
    adapter = ADAPTERS["lora"]
    adapter.attach(model)
    rates = [(group["lr"], len(group["params"])) for group in adapter.groups(model, 1e-3)]
    assert rates == [(1e-3, NUM_LINEARS)] * 2


def test_asymlora_learns_a_at_a_hundredth_of_bs_rate() -> None:
    groups = _groups(ADAPTERS["asymlora"])
    assert {rate: _kinds(names) for rate, names in groups.items()} == {
        1e-3: ["B"] * NUM_LINEARS,
        1e-3 * 0.01: ["A"] * NUM_LINEARS,
    }


def test_a_ratio_of_0_freezes_a_as_it_was_drawn() -> None:
    groups = _groups(LoraAdapter(a_rate_ratio=0.0))
    assert {rate: _kinds(names) for rate, names in groups.items()} == {1e-3: ["B"] * NUM_LINEARS}


@pytest.mark.parametrize("setting", [{"rank": 0}, {"lora_alpha": 0.0}, {"a_rate_ratio": -0.1}])
def test_settings_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        LoraAdapter(**setting)
