"""Environment and fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import torch

from tests.trainer.world import World, make_world
from trainer.base_model import BaseModel, load_base_model

DATA_DIR_VARIABLE = "ALTER_DATA_DIR"
VLLM = "vllm"
VLLM_FILES = frozenset(
    f"tests/server/{name}.py"
    for name in (
        "engine/test_architectures",
        "engine/test_canary",
        "engine/test_contract",
        "engine/test_routing",
        "engine/test_switch",
        "test_serve",
    )
)
"""They start vLLM: under `pytest -n` one after another, since its threads would wait for one another."""
WORLD = "world"
WORLD_FOLDERS = ("tests/trainer/", "tests/alter_eval/", "tests/benchmarks/")
"""Their files share models that take a minute or two to train, once for each worker that runs any of them."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays on one worker, all of vLLM on one, and all that share the small world on one."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return _scope_of(nodeid)

    config.option.loadscopereorder = False
    return ByFile(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins."""
    first = {VLLM: 0, WORLD: 1}
    items.sort(key=lambda item: first.get(_scope_of(item.nodeid), 2))


def _scope_of(nodeid: str) -> str:
    path = nodeid.partition("::")[0]
    if path in VLLM_FILES:
        return VLLM
    return WORLD if path.startswith(WORLD_FOLDERS) else path


@pytest.fixture(scope="session", autouse=True)
def _one_thread_for_small_tensors() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _state_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test writes into the audit log of who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The benchmark data, or skip: they are not part of the project."""
    folder = Path(os.environ.get(DATA_DIR_VARIABLE, Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(
            f"set {DATA_DIR_VARIABLE} to the folder with tofu/, text/ and models/ to run this test"
        )
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The small world; its model, which knows its rows by heart, is taught once."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="session")
def base(world: World) -> BaseModel:
    """The small world's model, shared: a test that changes it restores it."""
    return load_base_model(world.model, device="cpu")
