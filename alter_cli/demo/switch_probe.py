"""A domain is forgotten in the middle of a running stream: what the stream shows of it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from alter_core.errors import EngineError
from server.client import AdminClient

_STREAM_TOKENS = 600
_SWITCH_AFTER_TOKENS = 10
_PLACES_TRIED = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchProbe:
    """One activation under a running stream."""

    activate_ms: float
    """From the POST to its answer."""
    max_stream_gap_ms: float
    """Longest time between two tokens of the stream while the POST was under way."""
    tokens_after: int
    """Tokens of the stream that came after the switch."""
    tokens_equal_to_fresh_run: int
    """How many of them a fresh request over the same prefix gives under the new epoch."""


@dataclasses.dataclass(kw_only=True)
class _Stream:
    prompt: list[int] = dataclasses.field(default_factory=list)
    tokens: list[int] = dataclasses.field(default_factory=list)
    arrivals: list[float] = dataclasses.field(default_factory=list)
    """When each token came."""
    announced_at: int | None = None
    """Tokens that had come when the server announced the new epoch."""


class SwitchInsideAStream:
    """Streams an answer, activates a domain meanwhile, and replays the rest afresh.

    Reads the stream's lines itself: the announcement of the new epoch is an SSE comment, which the OpenAI
    client rightly passes over, and its parsing is slower than the engine.
    """

    def __init__(self, url: str, admin: AdminClient, model: str) -> None:
        self._http = httpx.Client(base_url=f"{url}/v1", timeout=120)
        self._admin = admin
        self._options: dict[str, Any] = {
            "model": model,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
        }

    def probe(self, question: str, name: str, bundle: Path) -> SwitchProbe:
        """Activates `bundle` as `name` while the answer to `question` is streamed.

        Raises: EngineError if the stream ended before the switch.
        """
        with ThreadPoolExecutor(max_workers=1) as executor:
            stream, activation = self._stream(
                question, lambda: executor.submit(self._activate, name, bundle)
            )
            started, ended = activation.result()
        if stream.announced_at is None:
            raise EngineError(
                "The stream was over before the switch, so there is nothing to compare",
                expected=f"fewer than {len(stream.tokens)} tokens before it",
                got="all of them",
                fix="Run the demo again on a machine that is less busy.",
            )
        gaps = [
            later - earlier
            for earlier, later in itertools.pairwise(stream.arrivals)
            if later >= started and earlier <= ended
        ]
        place, equal = self._first_place_that_replays(stream, stream.announced_at)
        return SwitchProbe(
            activate_ms=(ended - started) * 1000,
            max_stream_gap_ms=max(gaps) * 1000,
            tokens_after=len(stream.tokens) - place,
            tokens_equal_to_fresh_run=equal,
        )

    def _first_place_that_replays(self, stream: _Stream, announced_at: int) -> tuple[int, int]:
        """(place, equal tokens from there on) of the switch, which lies a few tokens before it is announced.

        A request over one token more or less has other last bits in its keys and values, and a greedy
        answer may leave the stream where two tokens are as likely; so the place itself is looked for.
        """
        best = announced_at, 0
        for place in range(announced_at, max(announced_at - _PLACES_TRIED, 0), -1):
            equal = self._equal_to_fresh_run(stream, place)
            if equal == len(stream.tokens) - place:
                return place, equal
            if equal > best[1]:
                best = place, equal
        return best

    def _stream(
        self, question: str, activate: Callable[[], Future[tuple[float, float]]]
    ) -> tuple[_Stream, Future[tuple[float, float]]]:
        stream, activation = _Stream(), None
        body = self._options | {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": _STREAM_TOKENS,
            "stream": True,
        }
        with self._http.stream("POST", "/chat/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith(": alter-epoch"):
                    stream.announced_at = len(stream.tokens)
                elif line.startswith("data: {"):
                    _take(stream, json.loads(line.removeprefix("data: ")))
                if activation is None and len(stream.tokens) >= _SWITCH_AFTER_TOKENS:
                    activation = activate()
        assert activation is not None, "the stream was too short"
        return stream, activation

    def _activate(self, name: str, bundle: Path) -> tuple[float, float]:
        """When the POST began and ended."""
        started = time.monotonic()
        self._admin.activate(name, str(bundle))
        return started, time.monotonic()

    def _equal_to_fresh_run(self, stream: _Stream, place: int) -> int:
        """Tokens from `place` on that a request over everything before it gives, too."""
        body = self._options | {
            "prompt": stream.prompt + stream.tokens[:place],
            "max_tokens": len(stream.tokens) - place,
        }
        fresh = self._http.post("/completions", json=body).raise_for_status().json()
        replayed = fresh["choices"][0]["token_ids"]
        return sum(a == b for a, b in zip(stream.tokens[place:], replayed, strict=True))


def _take(stream: _Stream, chunk: dict[str, Any]) -> None:
    stream.prompt = stream.prompt or chunk.get("prompt_token_ids") or []
    for choice in chunk["choices"]:
        new = choice.get("token_ids") or []
        stream.tokens += new
        stream.arrivals += [time.monotonic()] * len(new)
