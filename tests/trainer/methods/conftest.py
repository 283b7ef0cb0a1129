"""Every method, run once on the small world, with rates that its small model needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from alter_core.rows import read_rows
from tests.trainer.world import World
from trainer.base_model import load_base_model
from trainer.dataset import encode_rows
from trainer.evaluation import answer_losses, mean_probability
from trainer.methods import METHODS, LoraAdapter, Retaining, UnlearnSettings, make_method, unlearn

RATES: dict[str, dict[str, Any]] = {
    "idk_dpo": {"learning_rate": 6e-3},
    "rmu": {"learning_rate": 5e-3, "steering_coefficient": 20.0, "retain_weight": 10.0},
    "elm": {"learning_rate": 1e-2},
    "whp": {"reinforce_learning_rate": 1e-3, "reinforce_epochs": 20, "alpha": 20.0},
}


def settings_for(world: World, out: Path, name: str, **changes: Any) -> UnlearnSettings:
    """Settings that make a method forget the small world's red domain."""
    hyper = {"epochs": 12, "learning_rate": 2e-3} | RATES.get(name, {})
    hyper |= changes.pop("hyper", {})
    kind = METHODS[name]
    settings = UnlearnSettings(
        model=world.model,
        out=out,
        method=make_method(name, **hyper),
        forget=(world.files["red"],),
        retain=(world.files["retain"],) if issubclass(kind, Retaining) else (),
        adapter=LoraAdapter(rank=4) if kind.adapter_use == "required" else None,
        device="cpu",
    )
    return dataclasses.replace(settings, **changes)


def probability(world: World, model: Path, part: str) -> float:
    """Mean answer probability of a part's rows."""
    base = load_base_model(model, device="cpu")
    rows = encode_rows(read_rows([world.files[part]]), base.tokenizer, max_tokens=256)
    return mean_probability(answer_losses(base, rows))


@pytest.fixture(scope="session")
def unlearned(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folder by method."""
    folder = tmp_path_factory.mktemp("unlearned")
    return {name: unlearn(settings_for(world, folder / name, name)) for name in METHODS}
