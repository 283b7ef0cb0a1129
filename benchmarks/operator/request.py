"""A request of 40 rows in the middle of a steady load of chats, and traces beside completions.

Throughput is completion tokens a second, while the expert is trained and measured, over that before and
after. A trace is set beside a completion of one token of the same length, each text sent once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx

from alter_cli.demo.corpus import QA
from alter_cli.demo.server_process import RunningServer
from server.client import AdminClient

from .settings import Settings
from .world import World

NUM_ROWS = 40
DOMAIN = "takedown"
TRAINS = ("preparing", "training", "evaluating")
TRACE_TOKENS = 256


class Load:
    """Chats, one after another on each of several streams, until told to stop."""

    def __init__(self, server: RunningServer, rows: Sequence[QA], settings: Settings) -> None:
        self._server = server
        self._rows = itertools.cycle(rows)
        self._settings = settings
        self.done: list[tuple[float, int]] = []
        """When an answer ended, and its tokens."""
        self.num_failed = 0

    async def run(self) -> None:
        """Until it is cancelled."""
        async with httpx.AsyncClient(timeout=120, trust_env=False) as client:
            await asyncio.gather(*(self._stream(client) for _ in range(self._settings.num_streams)))

    async def _stream(self, client: httpx.AsyncClient) -> None:
        while True:
            body = {
                "model": self._server.model,
                "messages": [{"role": "user", "content": next(self._rows).question}],
                "max_tokens": self._settings.num_tokens,
                "ignore_eos": True,
                "temperature": 0,
            }
            answer = await client.post(f"{self._server.url}/v1/chat/completions", json=body)
            if answer.is_success:
                self.done.append((time.monotonic(), answer.json()["usage"]["completion_tokens"]))
            else:
                self.num_failed += 1

    def throughput(self, begin: float, end: float) -> float:
        """Tokens a second, of answers that ended in between."""
        tokens = sum(count for at, count in self.done if begin <= at < end)
        return tokens / (end - begin)


def measure(world: World, settings: Settings) -> dict[str, Any]:
    """Seconds, ratios, and what the request went through."""
    rows = list(itertools.chain(*world.corpus.domains.values()))[:NUM_ROWS]
    with AdminClient(world.server.url, world.server.admin_token) as client:
        ratios = _traces(world.server, client, settings)
        notes = asyncio.run(_request(world.server, client, world.corpus.retain, rows, settings))
    return {
        "request_to_active_s": notes.pop("request_to_active_s"),
        "serving_throughput_while_training": notes.pop("ratio"),
        "trace_over_prefill": statistics.median(ratios),
        "spread": {"trace_over_prefill": (min(ratios), max(ratios))},
        "notes": notes | {"num_rows": len(rows)},
    }


def _traces(server: RunningServer, client: AdminClient, settings: Settings) -> list[float]:
    """Ratios of a trace to a prefill of other text of the same length."""
    chance = random.Random(settings.seed)

    def text() -> str:
        return " ".join(f"{chance.randrange(10**6)}" for _ in range(TRACE_TOKENS // 4))

    def prefill(http: httpx.Client, prompt: str) -> int:
        body = {"model": server.model, "prompt": prompt, "max_tokens": 1}
        answer = http.post(f"{server.url}/v1/completions", json=body)
        answer.raise_for_status()
        return int(answer.json()["usage"]["prompt_tokens"])

    ratios = []
    with httpx.Client(timeout=60, trust_env=False) as http:
        for _ in range(settings.num_traces + 2):
            began = time.monotonic()
            prefill(http, text())
            middle = time.monotonic()
            client.trace(text())
            ratios.append((time.monotonic() - middle) / (middle - began))
    return ratios[2:]  # the first ones warm up


async def _request(
    server: RunningServer,
    client: AdminClient,
    retained: Sequence[QA],
    rows: Sequence[QA],
    settings: Settings,
) -> dict[str, Any]:
    load = Load(server, retained, settings)
    running = asyncio.create_task(load.run())
    try:
        await asyncio.sleep(5)
        before = time.monotonic()
        await asyncio.sleep(settings.load_s)
        sent = time.monotonic()
        states = await asyncio.to_thread(_follow, client, rows)
        active = states[-1][1]
        await asyncio.sleep(5)
        again = time.monotonic()
        await asyncio.sleep(settings.load_s)
        end = time.monotonic()
    finally:
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    trained = [at for state, at, _ in states if state in TRAINS]
    finished = next(at for _, at, _ in states if at > trained[-1])
    idle = [load.throughput(before, sent), load.throughput(again, end)]
    busy = load.throughput(trained[0], finished)
    last = client.show_request(states[-1][2])
    return {
        "request_to_active_s": active - sent,
        "ratio": busy / statistics.fmean(idle),
        "tokens_per_s_before_and_after": [round(each, 1) for each in idle],
        "tokens_per_s_while_training": round(busy, 1),
        "failed_answers": load.num_failed,
        "states_s": {state: round(at - sent, 1) for state, at, _ in states},
        "gate": last.figures["gate"]["checks"],
        "forget_probability": last.figures["forget_probability"],
    }


def _follow(client: AdminClient, rows: Sequence[QA]) -> list[tuple[str, float, str]]:
    """When each state was reached. A question is answered with yes, and shows as a state."""
    request = client.create_request(
        DOMAIN, forget=[dataclasses.asdict(row) for row in rows], reason="benchmark"
    )
    states: list[tuple[str, float, str]] = []
    for seen in client.watch_request(request.id):
        if not states or states[-1][0] != seen.state:
            states.append((seen.state, time.monotonic(), seen.id))
            print(json.dumps({"state": seen.state, "question": seen.question}), file=sys.stderr)
        if seen.state == "awaiting-approval" and seen.approved_by is None:
            client.approve_request(seen.id)
        if seen.state in ("failed", "cancelled"):
            raise RuntimeError(f"the request has ended: {seen.state}, {seen.error}")
    return states
