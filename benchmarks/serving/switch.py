"""Activations and revocations while 16 streams run: the switch, switch_retain and activation blocks.

The streams are those of vLLM's own benchmark client, one request after another. A switch recomputes those
that the expert touches that comes or goes, so a gap grows with their tokens: they are counted. In mixed
traffic that domain has its share. A gap is also looked for in as long a time before each change.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from pathlib import Path
from statistics import median
from typing import Any

import aiohttp
from vllm.benchmarks.lib.endpoint_request_func import (
    RequestFuncInput,
    async_request_openai_completions,
)

from alter_core.errors import EngineError
from server.client import AdminClient

from .artefacts import Artefacts, Family
from .gaps import Change, Stream, gap_beyond_step_s
from .servers import Started, our_server
from .settings import BenchSettings
from .traffic import Traffic, TrafficKind

NUM_STREAMS = 16
PROMPT_TOKENS = 32
ANSWER_TOKENS = range(64, 129)
_LATE = "late"
"""Name of the domain that comes and goes."""


def measure(
    made: Artefacts, settings: BenchSettings, scratch: Path, *, kind: TrafficKind, is_heavy: bool
) -> dict[str, Any]:
    """Switches on a server that has `num_domains` active; a heavy bundle weighs what a 7B's weighs."""
    count = settings.num_domains
    family = (made.heavy_family if is_heavy else made.family)(count + 1)
    traffic = Traffic(made.prose, made.names, num_domains=count + 1)
    with our_server(made, family, scratch / "ours.log", settings, free_slots=1) as ours:
        memory_before = ours.memory_bytes()
        streams, changes = asyncio.run(_under_load(ours, family, traffic, kind, settings))
        memory_after = ours.memory_bytes()
    step_s = median(gap for stream in streams for gap in stream.gaps)
    bundle = family.experts[count]
    return {
        "num_domains": count,
        "streams": NUM_STREAMS,
        "bundle_bytes": sum(file.stat().st_size for file in bundle.iterdir()),
        "step_s": step_s,
        "gap_beyond_step_s": [gap_beyond_step_s(streams, c.span, step_s) for c in changes],
        "gap_before_s": [gap_beyond_step_s(streams, c.span_before, step_s) for c in changes],
        "pause_s": [change.switch.pause_s for change in changes],
        "kept_requests": [change.switch.kept_requests for change in changes],
        "recomputed_requests": [change.switch.recomputed_requests for change in changes],
        "recomputed_tokens": [change.switch.recomputed_tokens for change in changes],
        "tokens_in_flight": [
            sum(stream.tokens_at(change.started) for stream in streams) for change in changes
        ],
        "post_to_active_s": [c.ended - c.started for c in changes if c.is_activation],
        "delete_to_revoked_s": [c.ended - c.started for c in changes if not c.is_activation],
        "memory_bytes_before": memory_before,
        "memory_bytes_after": memory_after,
        "start_s": ours.start_s,
    }


async def _under_load(
    ours: Started, family: Family, traffic: Traffic, kind: TrafficKind, settings: BenchSettings
) -> tuple[list[Stream], list[Change]]:
    is_over = asyncio.Event()
    numbers = itertools.count()
    streams: list[Stream] = []

    async def keep_streaming(session: aiohttp.ClientSession) -> None:
        while not is_over.is_set():
            number = next(numbers)
            ids = traffic.prompt(kind, PROMPT_TOKENS, number)
            request = _request(ours, ids, _answer_tokens(number))
            output = await async_request_openai_completions(request, session)
            if not output.success:
                raise EngineError("A stream broke off", got=output.error[-300:])
            streams.append(
                Stream(
                    prompt_tokens=output.prompt_len,
                    first_token=output.start_time + output.ttft,
                    gaps=output.itl,
                )
            )

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as group:
        for _ in range(NUM_STREAMS):
            group.create_task(keep_streaming(session))
        while len(streams) < NUM_STREAMS:  # all have begun, and the server is warm
            await asyncio.sleep(0.1)
        changes = []
        with ours.admin() as admin:
            bundle = family.experts[settings.num_domains]
            for number in range(settings.switches):
                change = _activate if number % 2 == 0 else _revoke
                changes.append(await asyncio.to_thread(change, admin, bundle))
                await asyncio.sleep(settings.switch_pause_s)
            if settings.switches % 2:
                await asyncio.to_thread(_revoke, admin, bundle)
        is_over.set()
    return streams, changes


def _answer_tokens(number: int) -> int:
    """Of a request: spread over the range, so that streams do not end together."""
    return ANSWER_TOKENS[37 * number % len(ANSWER_TOKENS)]


def _request(ours: Started, ids: list[int], answer_tokens: int) -> RequestFuncInput:
    return RequestFuncInput(
        prompt=ids,  # type: ignore[arg-type]
        api_url=f"{ours.server.url}/v1/completions",
        prompt_len=len(ids),
        output_len=answer_tokens,
        model=ours.server.model,
        ignore_eos=True,
        extra_body={"temperature": 0},
    )


def _activate(admin: AdminClient, bundle: Path) -> Change:
    started = time.perf_counter()
    answer = admin.activate(_LATE, str(bundle))
    ended = time.perf_counter()
    assert answer.switch is not None
    return Change(is_activation=True, started=started, ended=ended, switch=answer.switch)


def _revoke(admin: AdminClient, bundle: Path) -> Change:
    started = time.perf_counter()
    answer = admin.revoke(_LATE)
    ended = time.perf_counter()
    assert answer.switch is not None
    return Change(is_activation=False, started=started, ended=ended, switch=answer.switch)
