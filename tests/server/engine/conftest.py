"""One compiled engine for all tests of this package; other modes start their own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.engine_run import EngineRun, running
from tests.support.tiny import TinyBundles, make_bundles

MAX_BATCHED_TOKENS = 64
"""Small, so that prompts of the tests are prefilled in chunks."""
BLOCK_TOKENS = 32
"""Small, so that prompts of the tests fill blocks of the prefix cache."""


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> TinyBundles:
    return make_bundles(tmp_path_factory.mktemp("llama"), "llama", num_experts=3)


@pytest.fixture(scope="session")
def compiled_engine(bundles: TinyBundles) -> Iterator[EngineRun]:
    yield from running(
        bundles,
        max_num_batched_tokens=MAX_BATCHED_TOKENS,
        max_num_seqs=16,
        block_size=BLOCK_TOKENS,
    )


@pytest.fixture
def engine(compiled_engine: EngineRun) -> Iterator[EngineRun]:
    """The shared engine, with no domain active before and after."""
    yield compiled_engine
    compiled_engine.revoke_all()
