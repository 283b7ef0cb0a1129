"""The small world's model as one that knows its rows, and another that knows nothing."""

from __future__ import annotations

import dataclasses

import pytest

from alter_eval import tofu
from alter_eval.models import TransformersModel
from tests.trainer.world import World, make_model
from trainer.base_model import BaseModel, load_base_model
from trainer.dataset import encode_rows, read_rows

from .small_tofu import SETS, rows_of_set


@pytest.fixture(scope="session")
def exact_base(world: World) -> BaseModel:
    """In float32, where a batch gives what its rows give alone."""
    base = load_base_model(world.model, device="cpu")
    return dataclasses.replace(base, model=base.model.float())


@pytest.fixture(scope="session")
def ignorant_base(base: BaseModel) -> BaseModel:
    """Random weights."""
    model = make_model(len(base.tokenizer), seed=5).requires_grad_(False).eval()
    return dataclasses.replace(base, model=model)


def logs_of(base: BaseModel, world: World, judge: BaseModel) -> tofu.ModelLogs:
    holdout = encode_rows(read_rows([world.files["general"]]), base.tokenizer, max_tokens=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tofu, "_MAX_NEW_TOKENS", 24)
        model = TransformersModel(base)
        return tofu.ModelLogs(
            sets={
                name: tofu.evaluate_set(
                    model,
                    rows_of_set(name, 8 if name == "forget" else 4),
                    TransformersModel(judge) if name == "forget" else None,
                )
                for name in SETS
            },
            holdout=tofu.evaluate_holdout(model, holdout),
        )


@pytest.fixture(scope="session")
def knowing(base: BaseModel, world: World) -> tofu.ModelLogs:
    return logs_of(base, world, base)


@pytest.fixture(scope="session")
def ignorant(ignorant_base: BaseModel, base: BaseModel, world: World) -> tofu.ModelLogs:
    return logs_of(ignorant_base, world, base)
