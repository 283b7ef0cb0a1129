"""A `ForgetEngine` without a model, in one process: the same steps, and tokens that show what was active.

It reads and verifies bundles as the workers do, pauses running streams for the switch, and rolls back when a
step fails. A token is a function of the tokens before it and of the set of active experts, so every stream
shows under which experts each of its tokens was computed. The contract suite
(`tests/server/engine/test_contract.py`) runs on it and on vLLM alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, get_args

from alter_core.errors import EngineError, SwitchError
from alter_core.substrate import ForgetExpert, Substrate
from server.engine.base import (
    CanaryReport,
    EngineState,
    InFlight,
    RoutedTokens,
    SwitchReport,
    Trace,
    TracedToken,
)

Step = Literal["stage", "pause", "commit", "reset", "resume"]
STEPS: tuple[Step, ...] = get_args(Step)
VOCAB_SIZE = 512


class EngineDouble:
    """See the module."""

    def __init__(self, substrate: Substrate, max_domains: int, *, token_s: float = 0.0) -> None:
        """`token_s`: how long a token takes."""
        self._substrate = substrate
        self._digests: list[str | None] = [None] * max_domains
        self._counts: dict[int | None, int] = {None: 0}
        self._epoch = 0
        self._token_s = token_s
        self._is_trusted = True
        self._runs = asyncio.Event()
        self._runs.set()
        self._aborted = asyncio.Event()
        self.before_step: Callable[[Step], Awaitable[None]] = _nothing
        """Called before each step of a switch; what it raises fails the step."""
        self.can_roll_back = True

    @property
    def is_trusted(self) -> bool:
        """See `ForgetEngine.is_trusted`."""
        return self._is_trusted

    async def switch(
        self,
        *,
        epoch: int,
        slot: int,
        bundle: Path | None,
        digest: str | None,
        in_flight: InFlight = "recompute",
    ) -> SwitchReport:
        """See `ForgetEngine.switch`."""
        started = time.monotonic()
        if bundle is not None:
            await self._stage(bundle, digest)
        staged = time.monotonic()
        before = (self._epoch, list(self._digests), dict(self._counts))
        try:
            await self.before_step("pause")
            self._runs.clear()
            if in_flight == "abort":
                self._aborted.set()
                self._aborted = asyncio.Event()
            await self.before_step("commit")
            self._epoch, self._digests[slot] = epoch, digest
            self._counts.pop(slot, None)
            if digest is not None:
                self._counts[slot] = 0
            await self.before_step("reset")
            await self.before_step("resume")
        except Exception as error:
            self._epoch, self._digests, self._counts = before
            self._roll_back(error)
        self._runs.set()
        return SwitchReport(
            epoch=epoch,
            stage_s=staged - started,
            pause_s=time.monotonic() - staged,
            kept_requests=0,
            recomputed_requests=0,
            recomputed_tokens=0,
        )

    async def state(self) -> EngineState:
        """See `ForgetEngine.state`."""
        return EngineState(epoch=self._epoch, digests=tuple(self._digests))

    async def routed_tokens(self) -> list[RoutedTokens]:
        """See `ForgetEngine.routed_tokens`."""
        return [RoutedTokens(slot=slot, high=0, low=n) for slot, n in self._counts.items()]

    async def trace(self, token_ids: Sequence[int]) -> Trace:
        """See `ForgetEngine.trace`. Every token is on all active experts."""
        await self._runs.wait()
        slots = [slot for slot in self._counts if slot is not None]
        tokens = tuple(
            TracedToken(
                token_id=token_id,
                entropy=0.5,
                is_high=False,
                weights=tuple((slot, 1.0) for slot in slots),
            )
            for token_id in token_ids
        )
        return Trace(state=await self.state(), tokens=tokens)

    async def run_canary(self) -> CanaryReport:
        """See `ForgetEngine.run_canary`."""
        return CanaryReport(num_sites=1, min_logit_change=1.0, seconds=0.0)

    async def generate(self, prompt: list[int], num_tokens: int) -> AsyncIterator[int]:
        """Tokens after a prompt, fewer if the request is aborted; none while a switch has paused it."""
        tokens = list(prompt)
        aborted = self._aborted
        for _ in range(num_tokens):
            await asyncio.sleep(self._token_s)
            await self._runs.wait()
            if aborted.is_set():
                return
            tokens.append(next_token(tokens, self.active))
            for slot in self._counts:
                self._counts[slot] += 1
            yield tokens[-1]

    @property
    def active(self) -> frozenset[str]:
        """Digests of the experts that the next token is computed with."""
        return frozenset(digest for digest in self._digests if digest is not None)

    async def _stage(self, bundle: Path, digest: str | None) -> None:
        with _staging_errors():
            await self.before_step("stage")
            expert = await asyncio.to_thread(ForgetExpert.read, bundle, self._substrate)
            if expert.digest != digest:
                raise EngineError("Another bundle was staged", expected=digest, got=expert.digest)

    def _roll_back(self, cause: Exception) -> None:
        if self.can_roll_back:
            self._runs.set()
            raise SwitchError(
                "The switch failed; the previous experts are active again", got=str(cause)
            ) from cause
        self._is_trusted = False
        raise EngineError(
            "The switch failed and could not be undone; generation stays paused", got=str(cause)
        ) from cause


def next_token(tokens: list[int], active: frozenset[str]) -> int:
    """What follows `tokens` with these experts."""
    text = f"{tokens[-8:]}{sorted(active)}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % VOCAB_SIZE


async def _nothing(step: Step) -> None:
    """Lets every step pass."""


@contextlib.contextmanager
def _staging_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise SwitchError(
            "The expert could not be staged; nothing has changed", got=str(error)
        ) from error
