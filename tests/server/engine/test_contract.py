"""What `ForgetEngine` promises, of vLLM and of the double that stands in for it in tests and fault runs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from alter_core.bundle import read_manifest
from alter_core.errors import AlterError, BundleError, SwitchError
from alter_core.substrate import Substrate
from server.engine.base import ForgetEngine, SwitchReport, Trace
from tests.support.engine_double import EngineDouble
from tests.support.engine_run import EngineRun
from tests.support.tiny import TinyBundles

from .reference import random_prompts

PROMPT = random_prompts(1, 30)[0]
MAX_DOMAINS = 4
LENGTH = 60


@dataclasses.dataclass
class Subject:
    """One engine with no domain active, and how to use it."""

    engine: ForgetEngine
    run: Callable[[Coroutine[Any, Any, Any]], Any]
    stream: Callable[[list[int], int], AsyncIterator[list[int]]]
    """All tokens so far, again and again."""
    bundles: TinyBundles
    epoch: int

    def digest(self, name: str) -> str:
        return read_manifest(self.bundles.experts[name]).digest

    async def switch(self, slot: int, name: str | None, **fields: Any) -> SwitchReport:
        """The next epoch, which counts if the switch succeeds."""
        asked: dict[str, Any] = {"bundle": None, "digest": None}
        if name is not None:
            asked = {"bundle": self.bundles.experts[name], "digest": self.digest(name)}
        report = await self.engine.switch(epoch=self.epoch + 1, slot=slot, **(asked | fields))
        self.epoch += 1
        return report

    def change(self, slot: int, name: str | None, **fields: Any) -> SwitchReport:
        report: SwitchReport = self.run(self.switch(slot, name, **fields))
        return report

    def generate(self, prompt: list[int], num_tokens: int) -> list[int]:
        async def last() -> list[int]:
            tokens: list[int] = []
            async for so_far in self.stream(prompt, num_tokens):
                tokens = so_far
            return tokens

        found: list[int] = self.run(last())
        return found


@pytest.fixture(params=["double", "vllm"])
def subject(request: pytest.FixtureRequest, bundles: TinyBundles) -> Iterator[Subject]:
    if request.param == "vllm":
        yield _vllm(request.getfixturevalue("engine"))
        return
    with contextlib.closing(asyncio.new_event_loop()) as loop:
        yield _double(bundles, loop)


def _vllm(engine: EngineRun) -> Subject:
    async def stream(prompt: list[int], num_tokens: int) -> AsyncIterator[list[int]]:
        async for output in engine.stream(prompt, num_tokens):
            yield list(output.outputs[0].token_ids)

    subject = Subject(engine.engine, engine.run, stream, engine.bundles, engine.epoch)
    # The fixture empties the slots afterwards, under epochs that follow.
    engine.epoch += 1000
    return subject


def _double(bundles: TinyBundles, loop: asyncio.AbstractEventLoop) -> Subject:
    double = EngineDouble(Substrate.read(bundles.substrate), MAX_DOMAINS, token_s=0.001)

    async def stream(prompt: list[int], num_tokens: int) -> AsyncIterator[list[int]]:
        tokens: list[int] = []
        async for token in double.generate(prompt, num_tokens):
            tokens.append(token)
            yield list(tokens)

    return Subject(double, loop.run_until_complete, stream, bundles, 0)


def test_a_switch_is_what_the_state_says(subject: Subject) -> None:
    report = subject.change(1, "domain-0")
    assert report.epoch == subject.epoch
    state = subject.run(subject.engine.state())
    assert (state.epoch, len(state.digests)) == (subject.epoch, MAX_DOMAINS)
    assert state.digests == (None, subject.digest("domain-0"), None, None)
    subject.change(1, "domain-1")
    assert subject.run(subject.engine.state()).digests[1] == subject.digest("domain-1")
    subject.change(1, None)
    state = subject.run(subject.engine.state())
    assert (state.epoch, state.digests) == (subject.epoch, (None,) * MAX_DOMAINS)
    assert subject.engine.is_trusted


def test_tokens_show_which_experts_are_active_and_not_in_which_slot(subject: Subject) -> None:
    base = subject.generate(PROMPT, LENGTH)
    subject.change(0, "domain-0")
    active = subject.generate(PROMPT, LENGTH)
    assert active != base
    subject.change(2, "domain-1")
    subject.change(2, None)
    assert subject.generate(PROMPT, LENGTH) == active
    subject.change(0, None)
    assert subject.generate(PROMPT, LENGTH) == base
    subject.change(3, "domain-0")
    assert subject.generate(PROMPT, LENGTH) == active


def test_from_the_return_of_a_switch_a_running_stream_is_under_the_new_experts(
    subject: Subject,
) -> None:
    async def spanning() -> tuple[list[int], int]:
        tokens: list[int] = []
        has_begun, has_switched = asyncio.Event(), 0

        async def follow() -> None:
            nonlocal tokens
            async for tokens in subject.stream(PROMPT, 3 * LENGTH):
                if len(tokens) >= 10:
                    has_begun.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(follow())
            await has_begun.wait()
            await subject.switch(0, "domain-0")
            has_switched = len(tokens)
        return tokens, has_switched

    tokens, at = subject.run(spanning())
    assert at < 2 * LENGTH, "the switch came too late to tell anything"
    # A token that was on its way as the switch returned may be either's.
    at += 1
    assert tokens[at:] == subject.generate(PROMPT + tokens[:at], 3 * LENGTH - at)
    subject.change(0, None)
    assert tokens[at:] != subject.generate(PROMPT + tokens[:at], 3 * LENGTH - at)


@pytest.mark.parametrize("damage", ["absent", "torn", "another digest"])
def test_a_bundle_that_cannot_be_staged_changes_nothing(
    subject: Subject, damage: str, tmp_path: Path
) -> None:
    subject.change(0, "domain-0")
    before = subject.run(subject.engine.state()), subject.generate(PROMPT, LENGTH)
    bundle = tmp_path / "bundle"
    fields = {"bundle": bundle, "digest": subject.digest("domain-1")}
    if damage == "torn":
        shutil.copytree(subject.bundles.experts["domain-1"], bundle)
        weights = bundle / "weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-64])
    elif damage == "another digest":
        fields["bundle"] = subject.bundles.experts["domain-2"]
    with pytest.raises(AlterError) as caught:
        subject.change(0, "domain-1", **fields)
    assert isinstance(caught.value, BundleError | SwitchError)
    assert subject.engine.is_trusted
    assert (subject.run(subject.engine.state()), subject.generate(PROMPT, LENGTH)) == before


def test_aborting_ends_running_requests_and_not_later_ones(subject: Subject) -> None:
    async def spanning() -> list[int]:
        tokens: list[int] = []
        has_begun = asyncio.Event()

        async def follow() -> None:
            nonlocal tokens
            async for tokens in subject.stream(PROMPT, 10 * LENGTH // 2):
                if len(tokens) >= 5:
                    has_begun.set()

        async with asyncio.TaskGroup() as group:
            group.create_task(follow())
            await has_begun.wait()
            await subject.switch(0, "domain-0", in_flight="abort")
        return tokens

    assert 5 <= len(subject.run(spanning())) < 10 * LENGTH // 2
    assert len(subject.generate(PROMPT, LENGTH)) == LENGTH


def test_counts_are_of_the_retain_expert_and_of_the_occupied_slots(subject: Subject) -> None:
    subject.change(2, "domain-0")
    subject.generate(PROMPT, LENGTH)
    counts = {c.slot: c.high + c.low for c in subject.run(subject.engine.routed_tokens())}
    assert counts.keys() == {None, 2}
    assert counts[None] > 0


def test_a_trace_tells_of_every_token_and_leaves_everything_as_it_was(subject: Subject) -> None:
    subject.change(2, "domain-0")
    before = subject.run(subject.engine.state()), subject.generate(PROMPT, LENGTH)

    async def beside() -> tuple[Trace, list[int]]:
        stream = asyncio.create_task(_drain(subject.stream(PROMPT, LENGTH)))
        traces = [await subject.engine.trace(PROMPT) for _ in range(3)]
        assert all(trace.state == traces[0].state for trace in traces)
        return traces[-1], await stream

    trace, tokens = subject.run(beside())
    assert trace.state == before[0]
    assert [token.token_id for token in trace.tokens] == PROMPT
    assert {slot for token in trace.tokens for slot, _ in token.weights} <= {2}
    assert (subject.run(subject.engine.state()), tokens) == before


async def _drain(stream: AsyncIterator[list[int]]) -> list[int]:
    tokens: list[int] = []
    async for so_far in stream:
        tokens = so_far
    return tokens


def test_canary_leaves_no_trace(subject: Subject) -> None:
    before = subject.run(subject.engine.state()), subject.generate(PROMPT, LENGTH)
    assert subject.run(subject.engine.run_canary()).num_sites >= 1
    assert (subject.run(subject.engine.state()), subject.generate(PROMPT, LENGTH)) == before
