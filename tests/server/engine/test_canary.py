"""The start-up canary, with vLLM's compile cache warm from a run without the hook."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from alter_core.errors import CanaryError
from tests.support.engine_run import running
from tests.support.tiny import TinyBundles


@pytest.fixture(scope="module")
def warm_cache(bundles: TinyBundles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that an unhooked, compiled engine has filled."""
    folder = tmp_path_factory.mktemp("vllm-cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CACHE_ROOT", str(folder))
        unhooked = {"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker", "additional_config": {}}
        with contextlib.contextmanager(running)(bundles, **unhooked) as engine:
            assert len(engine.generate([[5, 6, 7]], 3)[0]) == 3
    return folder


def test_hook_is_in_force_with_a_cache_warm_from_an_unhooked_run(
    bundles: TinyBundles, warm_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(warm_cache))
    with contextlib.contextmanager(running)(bundles) as engine:
        assert engine.run(engine.engine.run_canary()).num_sites == 8


@pytest.mark.parametrize(
    "inert_site",
    [
        pytest.param(None, id="everywhere", marks=pytest.mark.slow),
        pytest.param("layers.2.down", id="one-site"),
    ],
)
def test_canary_fails_when_the_hook_is_inert(
    inert_site: str | None,
    bundles: TinyBundles,
    warm_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(warm_cache))
    inert = {
        "worker_cls": "tests.support.inert_worker.InertWorker",
        "additional_config": {
            "alter": {"substrate": str(bundles.substrate), "max_domains": 4},
            "inert_site": inert_site,
        },
        # One of the two is eager: start-up is quicker, and the canary must not depend on the mode.
        "enforce_eager": inert_site is not None,
    }
    with (
        contextlib.contextmanager(running)(bundles, **inert) as engine,
        pytest.raises(CanaryError, match="did not change the logits"),
    ):
        engine.run(engine.engine.run_canary())
