"""One finished run of training on the small world."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from trainer import TrainResult, TrainSettings, train

from .world import World


def settings_for(world: World, out: Path, *domains: str, **changes: Any) -> TrainSettings:
    """Settings that train the named domains of the small world."""
    settings = TrainSettings(
        model=world.model,
        out=out,
        forget={name: world.files[name] for name in domains},
        retain=(world.files["retain"],),
        general=(world.files["general"],),
        device="cpu",
    )
    return dataclasses.replace(settings, **changes)


@pytest.fixture(scope="session")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """Both domains, trained in one go with the defaults."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return train(settings_for(world, out, "red", "blue"))
