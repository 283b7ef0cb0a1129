"""The switch on a real, compiled vLLM engine."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from alter_core import ForgetExpert, Substrate
from alter_core.errors import SwitchError
from server.engine.base import SwitchReport
from tests.support.engine_run import EngineRun
from tests.support.tiny import PROVENANCE

from .conftest import BLOCK_TOKENS
from .reference import VOCAB_SIZE, random_prompts

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


@dataclasses.dataclass(frozen=True)
class Spanned:
    """Streams that ran across one switch."""

    report: SwitchReport | SwitchError
    tokens: list[list[int]]
    computed: list[Counter[int]]
    """How often each position of each stream was computed, from its start on."""
    late: Counter[int] = dataclasses.field(default_factory=Counter)
    """The same of a request that came after the switch, while the streams ran."""


TOTAL, AT = 120, 20


def _span(
    engine: EngineRun,
    prompts: list[list[int]],
    *,
    late: list[int] | None = None,
    ends_in_pause: bool = False,
    **switch: Any,
) -> Spanned:
    """Switches once every stream has `AT` tokens; `late` is sent after that.

    `ends_in_pause`: the last stream is ended once the engine is paused.
    """

    async def run() -> tuple[list[list[int]], SwitchReport | SwitchError]:
        tokens: list[list[int]] = [[] for _ in prompts]
        has_begun = [asyncio.Event() for _ in prompts]

        async def follow(index: int) -> None:
            async for output in engine.stream(prompts[index], TOTAL):
                tokens[index] = list(output.outputs[0].token_ids)
                if len(tokens[index]) >= AT:
                    has_begun[index].set()

        async with asyncio.TaskGroup() as group:
            for index in range(len(prompts)):
                group.create_task(follow(index))
            await asyncio.gather(*(event.wait() for event in has_begun))
            folder, digest = await _expert(engine, "domain-0")
            arguments = {"epoch": engine.epoch + 1, "slot": 0, "bundle": folder, "digest": digest}
            if ends_in_pause:
                await engine.client.engine_core.pause_scheduler_async("keep", clear_cache=False)
                await engine.client.abort(f"test-{first + len(prompts) - 1}")
                await asyncio.sleep(0.1)
            try:
                report: SwitchReport | SwitchError = await engine.engine.switch(
                    **(arguments | switch)
                )
                engine.epoch += 1
            except SwitchError as error:
                report = error
            assert max(map(len, tokens)) < TOTAL - 20, "the switch came too late to tell anything"
            if late is not None:
                await engine._finish(late, 1)
        return tokens, report

    first = next(engine._ids) + 1
    engine.run(engine.engine._rpc("alter_trace", ""))
    tokens, report = engine.run(run())
    rows = engine.run(engine.engine._rpc("alter_trace", None))[0]
    computed: dict[int, Counter[int]] = {}
    for row in rows:
        index = int(row["request"].split("-")[1]) - first
        positions = range(row["start"], row["start"] + len(row["entropy"]))
        computed.setdefault(index, Counter()).update(positions)
    return Spanned(
        report=report,
        tokens=tokens,
        computed=[computed[index] for index in range(len(prompts))],
        late=computed.get(len(prompts), Counter()),
    )


def _by_touch(
    engine: EngineRun, prompts: list[list[int]]
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts that domain-0 touches nowhere, their answers included; and those that it touches itself."""
    engine.activate(0, "domain-0")
    routes, _ = engine.routes_and_completions(prompts, TOTAL)
    engine.revoke(0)
    touched_at = [[r.position for r in each if r.expert == 1] for each in routes]
    cases = list(zip(prompts, touched_at, strict=True))
    quiet = [prompt for prompt, positions in cases if not positions]
    return quiet, [p for p, positions in cases if positions and min(positions) < len(p)]


Kinds = tuple[list[list[int]], list[list[int]]]


@pytest.fixture(scope="module")
def kinds(compiled_engine: EngineRun) -> Kinds:
    """Untouched and touched prompts that share their first two blocks, unequal behind them."""
    start = [token for token in range(3, 40) for _ in range(2 * BLOCK_TOKENS)]
    starts = [start[i : i + 2 * BLOCK_TOKENS] for i in range(0, len(start), 2 * BLOCK_TOKENS)]
    quiet_starts, _ = _by_touch(compiled_engine, starts)
    ends = [[token] * (5 + token % 7) for token in range(3, VOCAB_SIZE, 9)]
    quiet, touched = _by_touch(compiled_engine, [quiet_starts[0] + end for end in ends])
    assert len(quiet) >= 4
    assert len(touched) >= 2
    return quiet[:4], touched[:2]


def test_streams_that_no_expert_touches_are_not_recomputed(engine: EngineRun, kinds: Kinds) -> None:
    quiet, _ = kinds
    base = engine.generate(quiet, TOTAL)
    spanned = _span(engine, quiet)
    assert isinstance(spanned.report, SwitchReport)
    assert spanned.report.kept_requests == len(quiet)
    assert spanned.report.recomputed_requests == spanned.report.recomputed_tokens == 0
    assert all(set(computed.values()) == {1} for computed in spanned.computed)
    assert spanned.tokens == base
    revoked = _span(engine, quiet, bundle=None, digest=None)
    assert isinstance(revoked.report, SwitchReport)
    assert revoked.report.kept_requests == len(quiet)
    assert revoked.tokens == base


def test_streams_are_kept_when_another_request_ends_in_the_pause(
    engine: EngineRun, kinds: Kinds
) -> None:
    """vLLM then makes a step without tokens, which takes every request out of the runner's batch."""
    quiet, _ = kinds
    base = engine.generate(quiet, TOTAL)
    spanned = _span(engine, quiet, ends_in_pause=True)
    assert isinstance(spanned.report, SwitchReport)
    assert spanned.report.kept_requests == len(quiet) - 1
    assert spanned.report.recomputed_requests == 0
    assert spanned.tokens[:-1] == base[:-1]
    assert all(set(computed.values()) == {1} for computed in spanned.computed)


def test_touched_streams_are_recomputed_beside_kept_ones_that_share_their_first_blocks(
    engine: EngineRun, kinds: Kinds
) -> None:
    quiet, touched = kinds
    prompts = [quiet[0], touched[0], quiet[1], touched[1]]
    base = engine.generate(prompts, TOTAL)
    engine.run(engine.engine._reset_cache())
    engine.generate([quiet[0]], 1)
    spanned = _span(engine, prompts)
    assert isinstance(spanned.report, SwitchReport)
    assert (spanned.report.kept_requests, spanned.report.recomputed_requests) == (2, 2)
    for index in (0, 2):
        assert spanned.computed[index][0] == 0, "the shared blocks were not shared"
        assert set(spanned.computed[index].values()) == {1}
        assert spanned.tokens[index] == base[index]
    # The first of them to be recomputed computes the shared blocks anew; the other may share those.
    assert sum(spanned.computed[index][0] for index in (1, 3)) >= 1
    for index in (1, 3):
        prompt, tokens = prompts[index], spanned.tokens[index]
        assert spanned.computed[index][len(prompt) - 1] == 2
        first_new = next(i for i in range(TOTAL) if _continues(engine, prompt, tokens, i))
        assert AT <= first_new < TOTAL - 20
        assert tokens[:AT] == base[index][:AT]
    assert spanned.report.recomputed_tokens >= len(prompts[1]) + len(prompts[3]) + 2 * (AT - 1)


def test_streams_of_another_domain_are_kept(
    engine: EngineRun, kinds: Kinds, tmp_path: Path
) -> None:
    _, touched = kinds
    substrate = Substrate.read(engine.bundles.substrate)
    distant = ForgetExpert.read(engine.bundles.experts["domain-1"], substrate)
    distant.evidence.fc2.bias.data -= 1000
    distant = distant.write(tmp_path / "distant", substrate, training=PROVENANCE)
    engine.activate(0, "domain-0")
    before = engine.generate(touched, TOTAL)
    spanned = _span(
        engine, touched, slot=1, bundle=tmp_path / "distant", digest=str(distant.digest)
    )
    assert isinstance(spanned.report, SwitchReport)
    assert spanned.report.kept_requests == len(touched)
    assert all(set(computed.values()) == {1} for computed in spanned.computed)
    assert spanned.tokens == before == engine.generate(touched, TOTAL)


def test_request_after_a_switch_finds_no_block_from_before(engine: EngineRun, kinds: Kinds) -> None:
    quiet, _ = kinds
    engine.generate([quiet[0]], 1)
    late = quiet[0] + engine.generate([quiet[0]], TOTAL)[0][:AT]
    again = _span(engine, quiet[:1])
    assert again.computed[0][0] == 0, "nothing was in the cache"
    spanned = _span(engine, quiet[:1], late=late, bundle=None, digest=None)
    assert isinstance(spanned.report, SwitchReport)
    assert spanned.report.kept_requests == 1
    assert dict(spanned.late) == dict.fromkeys(range(len(late)), 1)


def test_failed_commit_harms_no_stream(engine: EngineRun, kinds: Kinds) -> None:
    quiet, touched = kinds
    prompts = quiet[:2] + touched[:1]
    base = engine.generate(prompts, TOTAL)
    spanned = _span(engine, prompts, bundle=None, digest="sha256:never-staged")
    assert isinstance(spanned.report, SwitchError)
    assert spanned.tokens == base
    assert engine.engine.is_trusted


def test_only_what_was_staged_last_can_be_committed(engine: EngineRun) -> None:
    (one, two) = (engine.run(_expert(engine, name)) for name in ("domain-0", "domain-1"))

    async def supersede() -> None:
        await engine.engine._stage(*one)
        await engine.engine._stage(*two)
        with pytest.raises(Exception, match="No such expert is staged"):
            await engine.engine._rpc("alter_is_staged", one[1])
        assert await engine.engine._rpc("alter_is_staged", two[1]) == [True]
        await engine.engine._rpc("alter_unstage")
        with pytest.raises(Exception, match="No such expert is staged"):
            await engine.engine._rpc("alter_is_staged", two[1])

    engine.run(supersede())


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
