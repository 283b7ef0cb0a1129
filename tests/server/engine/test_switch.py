"""The switch on a real, compiled vLLM engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from alter_core.errors import SwitchError
from tests.support.engine_run import EngineRun

from .reference import random_prompts

PROMPTS = random_prompts(6, 30)


def test_canary_changes_logits_at_every_site(engine: EngineRun) -> None:
    report = engine.run(engine.engine.run_canary())
    assert report.num_sites == len(engine.substrate.sites) == 8
    assert report.min_logit_change > 0.01


def test_active_domain_changes_tokens_it_is_routed_to(engine: EngineRun) -> None:
    base = engine.generate(PROMPTS, 12)
    engine.activate(0, "domain-0")
    assert engine.generate(PROMPTS, 12) != base


def test_revoked_domain_restores_base_logprobs_bitwise(engine: EngineRun) -> None:
    before = [engine.prompt_logprobs(prompt) for prompt in PROMPTS]
    engine.activate(0, "domain-0")
    engine.activate(3, "domain-1")
    active = [engine.prompt_logprobs(prompt) for prompt in PROMPTS]
    engine.revoke(3)
    engine.revoke(0)
    assert active != before
    assert [engine.prompt_logprobs(prompt) for prompt in PROMPTS] == before


def test_slot_does_not_matter_and_replacing_an_expert_leaves_nothing_of_the_old_one(
    engine: EngineRun,
) -> None:
    engine.activate(1, "domain-1")
    alone = [engine.prompt_logprobs(prompt) for prompt in PROMPTS]
    engine.revoke(1)
    engine.activate(2, "domain-0")
    engine.activate(2, "domain-1")
    assert [engine.prompt_logprobs(prompt) for prompt in PROMPTS] == alone


@pytest.mark.parametrize("at", [3, 40])
def test_every_token_after_a_switch_equals_a_fresh_run(engine: EngineRun, at: int) -> None:
    prompt, total = PROMPTS[0], 120

    async def switch_inside_a_stream() -> tuple[list[int], int]:
        tokens: list[int] = []
        switched_at = 0
        async for output in engine.stream(prompt, total):
            tokens = list(output.outputs[0].token_ids)
            if len(tokens) >= at and not switched_at:
                engine.epoch += 1
                digest = (await _expert(engine, "domain-0"))[1]
                folder = engine.bundles.experts["domain-0"]
                switch = engine.engine.switch(
                    epoch=engine.epoch, slot=0, bundle=folder, digest=digest
                )
                collected = asyncio.ensure_future(switch)
                while not collected.done():
                    await asyncio.sleep(0)
                collected.result()
                switched_at = -1
        return tokens, switched_at

    base = engine.generate([prompt], total)[0]
    tokens, _ = engine.run(switch_inside_a_stream())
    assert len(tokens) == total
    assert tokens[:at] == base[:at]
    first_new = next(i for i in range(total) if _continues(engine, prompt, tokens, i))
    assert first_new < total - 20, "the switch came too late to tell anything"
    fresh = engine.generate([prompt + tokens[:first_new]], total - first_new)[0]
    assert tokens[first_new:] == fresh


async def _expert(engine: EngineRun, name: str) -> tuple[Path, str]:
    from alter_core import read_manifest

    folder = engine.bundles.experts[name]
    return folder, read_manifest(folder).digest


def _continues(engine: EngineRun, prompt: list[int], tokens: list[int], start: int) -> bool:
    return (
        start % 5 == 0
        and engine.generate([prompt + tokens[:start]], len(tokens) - start)[0] == tokens[start:]
    )


def test_aborting_switch_ends_running_requests(engine: EngineRun) -> None:
    async def stream_and_switch() -> Any:
        last = None
        async for output in engine.stream(PROMPTS[0], 400):
            if last is None:
                folder, digest = await _expert(engine, "domain-0")
                engine.epoch += 1
                task = asyncio.ensure_future(
                    engine.engine.switch(
                        epoch=engine.epoch, slot=0, bundle=folder, digest=digest, in_flight="abort"
                    )
                )
            last = output
        await task
        return last

    last = engine.run(stream_and_switch())
    assert last.outputs[0].finish_reason == "abort"
    assert len(last.outputs[0].token_ids) < 400


def test_unreadable_bundle_changes_nothing(engine: EngineRun, tmp_path: Path) -> None:
    engine.activate(0, "domain-0")
    before = engine.run(engine.engine.state())
    answers = engine.generate(PROMPTS, 8)
    with pytest.raises(SwitchError, match="nothing has changed"):
        engine.run(engine.engine.switch(epoch=99, slot=1, bundle=tmp_path, digest="sha256:0"))
    assert engine.run(engine.engine.state()) == before
    assert engine.generate(PROMPTS, 8) == answers
    assert engine.engine.is_trusted


def test_failed_commit_restores_the_previous_experts(engine: EngineRun) -> None:
    engine.activate(0, "domain-0")
    before = engine.run(engine.engine.state())
    answers = engine.generate(PROMPTS, 8)
    with pytest.raises(SwitchError, match="active again"):
        engine.run(
            engine.engine.switch(epoch=99, slot=0, bundle=None, digest="sha256:never-staged")
        )
    assert engine.run(engine.engine.state()) == before
    assert engine.generate(PROMPTS, 8) == answers
    assert engine.engine.is_trusted


def test_routed_tokens_are_counted_by_expert_and_path(engine: EngineRun) -> None:
    engine.activate(1, "domain-0")
    before = {r.slot: r.high + r.low for r in engine.run(engine.engine.routed_tokens())}
    assert before[1] == 0
    engine.generate(PROMPTS, 10)
    after = {r.slot: r.high + r.low for r in engine.run(engine.engine.routed_tokens())}
    computed = sum(len(prompt) + 10 - 1 for prompt in PROMPTS)
    assert after[1] > 0
    assert (after[None] - before[None]) + after[1] == computed
