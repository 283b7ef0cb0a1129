"""A domain is forgotten in the middle of a running stream: what the stream shows of it."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import httpx
from openai import AsyncOpenAI

from alter_core.errors import EngineError

from .server_process import RunningServer

_STREAM_TOKENS = 600
_SWITCH_AFTER_TOKENS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchProbe:
    """One activation under a running stream."""

    activate_ms: float
    """From the POST to its answer."""
    max_stream_gap_ms: float
    """Longest time between two tokens of the stream while the POST was under way."""
    tokens_after: int
    """Tokens of the stream that came after the POST was answered."""
    tokens_equal_to_fresh_run: int
    """How many of them a fresh request over the same prefix gives under the new epoch."""


async def switch_inside_a_stream(
    server: RunningServer, question: str, name: str, bundle: Path
) -> SwitchProbe:
    """Streams an answer, activates `bundle` as `name` meanwhile, and replays the rest afresh."""
    client = AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused")
    options: dict[str, Any] = {
        "model": server.model,
        "temperature": 0,
        "extra_body": {"ignore_eos": True, "return_token_ids": True},
    }
    stream = await client.chat.completions.create(
        messages=[{"role": "user", "content": question}],
        max_tokens=_STREAM_TOKENS,
        stream=True,
        **options,
    )
    prompt: list[int] = []
    tokens: list[int] = []
    arrivals: list[float] = []
    activation: asyncio.Task[tuple[float, float, int]] | None = None
    async for chunk in stream:
        prompt = prompt or (chunk.model_extra or {}).get("prompt_token_ids") or []
        for choice in chunk.choices:
            new = (choice.model_extra or {}).get("token_ids") or []
            tokens += new
            arrivals += [time.monotonic()] * len(new)
        if activation is None and len(tokens) >= _SWITCH_AFTER_TOKENS:
            activation = asyncio.create_task(_activate(server, name, bundle, tokens))
        # A busy stream would never let the activation run.
        await asyncio.sleep(0)
    assert activation is not None, "the stream ended before the switch"
    started, ended, num_before = await activation
    if num_before == len(tokens):
        raise EngineError(
            "The stream was over before the switch, so there is nothing to compare",
            expected=f"fewer than {len(tokens)} tokens before it",
            got=f"{num_before}",
            fix="Run the demo again on a machine that is less busy.",
        )
    fresh = await client.completions.create(
        prompt=prompt + tokens[:num_before], max_tokens=len(tokens) - num_before, **options
    )
    after = tokens[num_before:]
    replayed = (fresh.choices[0].model_extra or {})["token_ids"]
    await client.close()
    return SwitchProbe(
        activate_ms=(ended - started) * 1000,
        max_stream_gap_ms=1000
        * max(
            later - earlier
            for earlier, later in itertools.pairwise(arrivals)
            if later >= started and earlier <= ended
        ),
        tokens_after=len(after),
        tokens_equal_to_fresh_run=sum(a == b for a, b in zip(after, replayed, strict=True)),
    )


async def _activate(
    server: RunningServer, name: str, bundle: Path, tokens: list[int]
) -> tuple[float, float, int]:
    """When the POST began and ended, and how many tokens had come by then."""
    async with httpx.AsyncClient(timeout=60) as http:
        started = time.monotonic()
        response = await http.post(
            f"{server.url}/admin/forget-domains",
            json={"name": name, "bundle": str(bundle)},
            headers={"Authorization": f"Bearer {server.admin_token}"},
        )
        response.raise_for_status()
        return started, time.monotonic(), len(tokens)
