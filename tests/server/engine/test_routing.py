"""Routes of the real engine against the transformers reference, under everything a scheduler does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.engine_run import EngineRun, Route, running
from tests.support.tiny import TinyBundles

from .conftest import MAX_BATCHED_TOKENS
from .reference import Reference, random_prompts

DOMAINS = ["domain-0", "domain-1", "domain-2"]


@pytest.fixture(scope="module")
def reference(bundles: TinyBundles) -> Reference:
    return Reference(bundles, DOMAINS)


@pytest.fixture
def active_engine(engine: EngineRun) -> EngineRun:
    for slot, name in enumerate(DOMAINS):
        engine.activate(slot, name)
    return engine


def _assert_routes_equal_reference(
    engine: EngineRun, reference: Reference, prompts: list[list[int]]
) -> None:
    routed = set()
    for prompt, routes in zip(prompts, engine.routes(prompts), strict=True):
        reference.assert_routes(routes, prompt)
        assert routes[-1].position == len(prompt) - 1
        routed |= {route.expert for route in routes}
    assert routed >= {-1, 1, 2, 3}, "the prompts do not reach every expert"


def test_routes_equal_reference_in_one_chunk(
    active_engine: EngineRun, reference: Reference
) -> None:
    prompts = random_prompts(1, MAX_BATCHED_TOKENS - 14) + random_prompts(3, 10, seed=1)
    _assert_routes_equal_reference(active_engine, reference, prompts)


def test_routes_equal_reference_under_chunked_prefill(
    active_engine: EngineRun, reference: Reference
) -> None:
    prompts = random_prompts(5, 3 * MAX_BATCHED_TOKENS, seed=2)
    _assert_routes_equal_reference(active_engine, reference, prompts)


def test_routes_equal_reference_after_prefix_cache_hits(
    active_engine: EngineRun, reference: Reference
) -> None:
    shared = random_prompts(1, 290, seed=3)[0]
    prompts = [shared + tail for tail in random_prompts(3, 20, seed=4)]
    active_engine.generate([shared], 1)
    routes = active_engine.routes(prompts)
    for prompt, actual in zip(prompts, routes, strict=True):
        assert len(actual) < len(prompt), "the prefix cache was not hit"
        reference.assert_routes(actual, prompt)


def test_trace_equals_reference_though_its_prefix_is_cached(
    active_engine: EngineRun, reference: Reference
) -> None:
    prompt = random_prompts(1, 3 * MAX_BATCHED_TOKENS, seed=8)[0]
    active_engine.generate([prompt], 1)
    trace = active_engine.run(active_engine.engine.trace(prompt))
    assert trace.state.epoch == active_engine.epoch
    routes = [
        Route.of(
            position,
            token.entropy,
            [(0 if slot is None else slot + 1, weight) for slot, weight in token.weights],
        )
        for position, token in enumerate(trace.tokens)
    ]
    reference.assert_routes(routes, prompt)
    high = [token.is_high for token in trace.tokens]
    assert any(high)
    assert not all(high)


def test_routes_of_generated_tokens_equal_reference(
    active_engine: EngineRun, reference: Reference
) -> None:
    prompts = random_prompts(8, 25, seed=5)
    routes, completions = active_engine.routes_and_completions(prompts, 40)
    for prompt, completion, actual in zip(prompts, completions, routes, strict=True):
        reference.assert_routes(actual, prompt + completion)
        assert len(actual) == len(prompt) + 39


def test_logprobs_equal_reference_within_bf16_noise(
    engine: EngineRun, reference: Reference
) -> None:
    prompts = random_prompts(6, 60, seed=6)
    with reference.attached.disabled():
        noise = _mean_difference(engine, reference, prompts)
    unlike = _mean_difference(engine, reference, prompts)
    for slot, name in enumerate(DOMAINS):
        engine.activate(slot, name)
    difference = _mean_difference(engine, reference, prompts)
    assert difference < 1.5 * noise
    assert unlike > 5 * noise, "the experts change too little to tell anything"


def _mean_difference(engine: EngineRun, reference: Reference, prompts: list[list[int]]) -> float:
    differences = [
        torch.tensor(engine.prompt_logprobs(prompt)) - reference.logprobs(prompt)
        for prompt in prompts
    ]
    return float(torch.cat(differences).abs().mean())


@pytest.fixture(scope="module")
def cramped_engine(bundles: TinyBundles) -> Iterator[EngineRun]:
    """An engine with too few cache blocks for its requests."""
    yield from running(
        bundles,
        enforce_eager=True,
        num_gpu_blocks_override=9,
        max_num_batched_tokens=512,
        disable_log_stats=False,
    )


def test_routes_equal_reference_after_preemption(
    cramped_engine: EngineRun, reference: Reference
) -> None:
    engine = cramped_engine
    for slot, name in enumerate(DOMAINS):
        engine.activate(slot, name)
    prompts = random_prompts(6, 100, seed=7)
    before = engine.preemptions()
    routes, completions = engine.routes_and_completions(prompts, 120)
    assert engine.preemptions() > before, "nothing was preempted"
    for prompt, completion, actual in zip(prompts, completions, routes, strict=True):
        reference.assert_routes(actual, prompt + completion)
        assert len(actual) == len(prompt) + 119
