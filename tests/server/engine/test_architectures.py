"""Every supported architecture, eager and compiled, and tensor parallelism: same routes, same answers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from alter_core import AlterConfig
from tests.support.engine_run import EngineRun, running
from tests.support.tiny import ARCHITECTURES, TinyBundles, make_bundles

from .reference import Reference, random_prompts

PROMPTS = random_prompts(4, 50, seed=20)
DOMAINS = ["domain-0", "domain-1"]


@pytest.fixture(scope="module")
def bundles_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyBundles]:
    made: dict[str, TinyBundles] = {}

    def build(architecture: str) -> TinyBundles:
        if architecture not in made:
            config = AlterConfig(
                tap_layer=1,
                rank=8,
                lora_alpha=16.0,
                evidence_window=16,
                retain_expert=_retain(architecture),
            )
            made[architecture] = make_bundles(
                tmp_path_factory.mktemp(architecture), architecture, config=config
            )
        return made[architecture]

    return build


def _retain(architecture: str) -> str:
    """One of them has a trained retain expert, so that B_r is proven in the engine, too."""
    return "trained" if architecture == "phi3" else "identity"


# Llama's, compiled, is the engine that the tests beside this one share.
_EAGER = [
    pytest.param(
        name,
        True,
        id=f"{name}-eager",
        marks=pytest.mark.slow if name in ("llama", "mistral") else (),
    )
    for name in ARCHITECTURES
]
_COMPILED = [
    pytest.param(name, False, id=f"{name}-compiled", marks=pytest.mark.slow)
    for name in ARCHITECTURES
    if name != "llama"
]


@pytest.mark.parametrize(("architecture", "enforce_eager"), _EAGER + _COMPILED)
def test_architecture_routes_answers_and_revokes_as_the_reference(
    architecture: str, enforce_eager: bool, bundles_of: Callable[[str], TinyBundles]
) -> None:
    bundles = bundles_of(architecture)
    with contextlib.contextmanager(running)(bundles, enforce_eager=enforce_eager) as engine:
        report = engine.run(engine.engine.run_canary())
        assert report.num_sites == len(engine.substrate.sites)
        base = [engine.prompt_logprobs(prompt) for prompt in PROMPTS]
        for slot, name in enumerate(DOMAINS):
            engine.activate(slot, name)
        _assert_equals_reference(engine, bundles, base)
        engine.revoke_all()
        assert [engine.prompt_logprobs(prompt) for prompt in PROMPTS] == base


@pytest.mark.slow
def test_a_rank_and_dtype_off_the_beaten_track_route_and_answer_as_the_reference(
    tmp_path: Path,
) -> None:
    """Every other pair is in test_delta_shapes, without an engine."""
    config = AlterConfig(tap_layer=1, rank=3, lora_alpha=6.0, evidence_window=16)
    bundles = make_bundles(tmp_path, config=config)
    with contextlib.contextmanager(running)(bundles, dtype="float16", enforce_eager=True) as engine:
        report = engine.run(engine.engine.run_canary())
        assert report.num_sites == len(engine.substrate.sites)
        base = [engine.prompt_logprobs(prompt) for prompt in PROMPTS]
        for slot, name in enumerate(DOMAINS):
            engine.activate(slot, name)
        _assert_equals_reference(engine, bundles, base)
        engine.revoke_all()
        assert [engine.prompt_logprobs(prompt) for prompt in PROMPTS] == base


def _assert_equals_reference(
    engine: EngineRun, bundles: TinyBundles, base: list[list[float]]
) -> None:
    nobody = Reference(bundles, [])
    noise = torch.cat(
        [torch.tensor(b) - nobody.logprobs(p) for b, p in zip(base, PROMPTS, strict=True)]
    )
    nobody.attached.detach()
    reference = Reference(bundles, DOMAINS)
    active = [torch.tensor(engine.prompt_logprobs(prompt)) for prompt in PROMPTS]
    difference = torch.cat(
        [a - reference.logprobs(p) for a, p in zip(active, PROMPTS, strict=True)]
    )
    effect = torch.cat([a - torch.tensor(b) for a, b in zip(active, base, strict=True)])
    assert difference.abs().mean() < 1.5 * noise.abs().mean() + 1e-3
    assert effect.abs().mean() > 5 * difference.abs().mean()
    agreeing = total = 0
    for prompt, routes in zip(PROMPTS, engine.routes(PROMPTS), strict=True):
        expected = reference.experts(prompt)
        agreeing += sum(route.expert == expected[route.position] for route in routes)
        total += len(routes)
    # The path of a token with borderline entropy may differ by bf16 noise of the tap layer's input.
    assert agreeing >= 0.99 * total


def test_two_tensor_parallel_ranks_route_and_answer_as_one(
    bundles_of: Callable[[str], TinyBundles], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    bundles = bundles_of("llama")
    with contextlib.contextmanager(running)(
        bundles, tensor_parallel_size=2, enforce_eager=True
    ) as engine:
        report = engine.run(engine.engine.run_canary())
        assert report.num_sites == len(engine.substrate.sites)
        base = [engine.prompt_logprobs(prompt) for prompt in PROMPTS]
        for slot, name in enumerate(DOMAINS):
            engine.activate(slot, name)
        _assert_equals_reference(engine, bundles, base)
        engine.revoke_all()
        assert [engine.prompt_logprobs(prompt) for prompt in PROMPTS] == base
