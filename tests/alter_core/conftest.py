"""Hypothesis settings, and tiny models that are made once."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import hypothesis
import pytest
from transformers import PreTrainedModel

from tests.support.tiny import ARCHITECTURES, load_model, save_model

hypothesis.settings.register_profile(
    "alter_core", deadline=None, derandomize=True, database=None, max_examples=60
)
hypothesis.settings.load_profile("alter_core")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyBase:
    """A saved model, loaded in the precision of serving and in one that shows small errors.

    Tests may attach to these models, and must detach again.
    """

    folder: Path
    bf16: PreTrainedModel
    float32: PreTrainedModel


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TinyBase]:
    """One tiny model of every supported architecture."""
    made = {}
    for architecture in ARCHITECTURES:
        folder = save_model(tmp_path_factory.mktemp(architecture), architecture)
        model = load_model(folder)
        made[architecture] = TinyBase(
            folder=folder, bf16=model, float32=copy.deepcopy(model).float()
        )
    return made


@pytest.fixture(params=ARCHITECTURES)
def base(request: pytest.FixtureRequest, bases: dict[str, TinyBase]) -> TinyBase:
    """The tiny model of each architecture in turn."""
    return bases[request.param]


@pytest.fixture
def llama(bases: dict[str, TinyBase]) -> TinyBase:
    """For behaviour that does not depend on the architecture."""
    return bases["llama"]
