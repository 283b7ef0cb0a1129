"""`ForgetEngine` over a running vLLM `EngineClient`: the switch protocol and the canary.

    stage    read, verify and shard on every worker        in a thread, generation runs on
    pause    the scheduler freezes after the current step
    commit   copy into the slot, begin the epoch            on every worker
    reset    drop the prefix cache; running requests will be recomputed from their first token, but
             for those that neither the expert that went nor the one that came touches; go on

The engine works calls off in the order in which they were sent: pause and commit are sent together.
No token generated after the resume attends to keys and values that the change would have made different.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm import SamplingParams, TokensPrompt
from vllm.engine.protocol import EngineClient

from alter_core.errors import CanaryError, EngineError, SwitchError

from .base import (
    CanaryReport,
    EngineState,
    InFlight,
    RoutedTokens,
    SwitchReport,
    Trace,
    TracedToken,
)

_RPC_TIMEOUT_S = 300.0
_STAGE_POLL_S = 0.01
_CANARY_PROMPT_TOKENS = 8
_MIN_CANARY_CHANGE = 1e-2
"""Nats. The planted expert is as strong as the layer itself; noise between equal runs is far below."""
_MAX_CANARY_RESIDUE = 1e-3


class VllmForgetEngine:
    """Switches forget experts in the workers behind one `EngineClient`."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._is_trusted = True
        self._confirmation: asyncio.Task[None] | None = None
        self._tracing = asyncio.Lock()

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
        try:
            _, committed = await asyncio.gather(
                self._pause(in_flight), self._rpc("alter_commit", epoch, slot, digest)
            )
            self._require_committed(committed, epoch, slot, digest)
            recomputed = await self._reset_touched_and_resume(committed)
        except Exception as error:
            await self._roll_back(epoch, error)
        self._confirmation = asyncio.create_task(self._confirm(epoch))
        return SwitchReport(
            epoch=epoch,
            stage_s=staged - started,
            pause_s=time.monotonic() - staged,
            **recomputed,
        )

    async def _pause(self, in_flight: InFlight) -> None:
        # Without `AsyncLLM.pause_generation`'s sleep of 20 ms, which only lets outputs be delivered
        # first, and without its reset of the cache, which would preempt every request.
        await self._client.engine_core.pause_scheduler_async(
            mode="keep" if in_flight == "recompute" else "abort", clear_cache=False
        )

    async def _confirm(self, epoch: int) -> None:
        """Frees what a rollback would have needed; the next commit does so too."""
        with contextlib.suppress(Exception):
            await self._rpc("alter_confirm", epoch)

    async def _stage(self, bundle: Path, digest: str | None) -> None:
        try:
            async with asyncio.timeout(_RPC_TIMEOUT_S):
                await self._rpc("alter_start_staging", str(bundle), digest)
                while not all(await self._rpc("alter_is_staged", digest)):
                    await asyncio.sleep(_STAGE_POLL_S)
                await self._rpc("alter_prepare", digest)
        except Exception as error:
            with contextlib.suppress(Exception):
                await self._rpc("alter_unstage")
            raise SwitchError(
                "A worker could not stage the expert; nothing has changed",
                got=str(error),
                fix="Check that every worker can read the bundle's folder.",
            ) from error

    async def _roll_back(self, epoch: int, cause: Exception) -> None:
        """Restores the previous experts and raises; without proof of that the engine stays paused."""
        self._is_trusted = False
        with contextlib.suppress(Exception):
            await self._pause("recompute")
            await self._rpc("alter_rollback", epoch)
            await self._reset_cache()
            await self.state()
            await self._client.resume_generation()
            self._is_trusted = True
        if self._is_trusted:
            raise SwitchError(
                "The switch failed; the previous experts are active again", got=str(cause)
            ) from cause
        raise EngineError(
            "The switch failed and could not be undone; generation stays paused",
            got=str(cause),
            fix="Restart the server; its domains are applied before it answers.",
        ) from cause

    def _require_committed(
        self, committed: list[dict[str, Any]], epoch: int, slot: int, digest: str | None
    ) -> None:
        state = self._agreed(committed)
        if state.epoch != epoch or state.digests[slot] != digest:
            raise EngineError(
                "The workers do not hold what was committed",
                expected=f"epoch {epoch} with {digest} in slot {slot}",
                got=f"epoch {state.epoch} with {state.digests[slot]}",
            )

    async def _reset_touched_and_resume(self, committed: list[dict[str, Any]]) -> dict[str, int]:
        """Drops the prefix cache, and running requests unless all workers call them untouched.

        Returns: what `AlterScheduler.reset_prefix_cache` reports.
        """
        untouched = set.intersection(*(set(answer["untouched"].items()) for answer in committed))
        # The client's own method would make a bool of the answer.
        report: Any = await self._client.engine_core.call_utility_async(
            "reset_prefix_cache", {"untouched": dict(untouched)}, True
        )
        if not isinstance(report, dict):
            raise EngineError(
                "vLLM did not say what it recomputes",
                expected="the report of ALTER's scheduler",
                got=str(report),
                fix="Start the engine with scheduler_cls server.engine.scheduler.AlterScheduler.",
            )
        return report

    async def _reset_cache(self) -> None:
        if not await self._client.reset_prefix_cache(reset_running_requests=True):
            raise EngineError("vLLM did not drop its prefix cache", expected="True", got="False")

    async def state(self) -> EngineState:
        """See `ForgetEngine.state`."""
        return self._agreed(await self._rpc("alter_state"))

    def _agreed(self, states: list[dict[str, Any]]) -> EngineState:
        held = [EngineState(epoch=s["epoch"], digests=tuple(s["digests"])) for s in states]
        if any(state != held[0] for state in held):
            self._is_trusted = False
            raise EngineError("The workers disagree about what they apply", got=str(held))
        return held[0]

    async def routed_tokens(self) -> list[RoutedTokens]:
        """See `ForgetEngine.routed_tokens`."""
        counts = (await self._rpc("alter_routed_tokens"))[0]
        state = await self.state()
        retain = [RoutedTokens(slot=None, high=counts[0][0], low=counts[0][1])]
        return retain + [
            RoutedTokens(slot=slot, high=counts[slot + 1][0], low=counts[slot + 1][1])
            for slot, digest in enumerate(state.digests)
            if digest is not None
        ]

    async def trace(self, token_ids: Sequence[int]) -> Trace:
        """See `ForgetEngine.trace`."""
        async with self._tracing:
            while True:
                state = await self.state()
                tokens = await self._traced(token_ids)
                if await self.state() == state:  # no switch came between
                    return Trace(state=state, tokens=tokens)

    async def _traced(self, token_ids: Sequence[int]) -> tuple[TracedToken, ...]:
        request = f"alter-trace-{uuid.uuid4()}"
        # Of a prefix that is in the cache nothing would be computed.
        params = SamplingParams(max_tokens=1, detokenize=False, skip_reading_prefix_cache=True)
        prompt = TokensPrompt(prompt_token_ids=list(token_ids))
        await self._rpc("alter_trace", request)
        try:
            async for _ in self._client.generate(prompt, params, request):
                pass
        finally:
            rows = (await self._rpc("alter_trace", None))[0]
        # Of a request that was computed again, the later rows count.
        routes = {
            row["start"] + offset: (entropy, is_high, weights)
            for row in rows
            for offset, (entropy, is_high, weights) in enumerate(
                zip(row["entropy"], row["is_high"], row["weights"], strict=True)
            )
        }
        if not routes.keys() >= set(range(len(token_ids))):
            raise EngineError(
                "The workers did not say how every token was routed",
                expected=f"{len(token_ids)} tokens",
                got=str(len(routes)),
            )
        traced = []
        for position, token_id in enumerate(token_ids):
            entropy, is_high, weights = routes[position]
            slots = tuple(
                (expert - 1 if expert > 0 else None, weight) for expert, weight in weights
            )
            traced.append(
                TracedToken(token_id=token_id, entropy=entropy, is_high=is_high, weights=slots)
            )
        return tuple(traced)

    async def run_canary(self) -> CanaryReport:
        """See `ForgetEngine.run_canary`."""
        started = time.monotonic()
        sites: list[str] = (await self._rpc("alter_sites"))[0]
        base = await self._probe()
        changes = []
        try:
            for site in sites:
                await self._rpc("alter_plant", site)
                change = _max_difference(base, await self._probe())
                if change < _MIN_CANARY_CHANGE:
                    raise CanaryError(
                        f"An expert planted at {site!r} did not change the logits",
                        expected=f"a change of at least {_MIN_CANARY_CHANGE} nats",
                        got=f"{change:.2g}",
                        fix="The installed hook is inert; clear vLLM's compile cache and start again.",
                    )
                changes.append(change)
        finally:
            await self._rpc("alter_plant", None)
        if (residue := _max_difference(base, await self._probe())) > _MAX_CANARY_RESIDUE:
            raise CanaryError(
                "The planted expert was removed but the logits did not come back",
                expected=f"a difference of at most {_MAX_CANARY_RESIDUE} nats",
                got=f"{residue:.2g}",
            )
        return CanaryReport(
            num_sites=len(sites), min_logit_change=min(changes), seconds=time.monotonic() - started
        )

    async def _probe(self) -> dict[int, float]:
        """Log-probabilities of the likeliest tokens after a fixed prompt, with an empty prefix cache."""
        await self._reset_cache()
        vocab_size = self._client.model_config.get_vocab_size()
        token_ids = [(7 * i + 3) % vocab_size for i in range(_CANARY_PROMPT_TOKENS)]
        params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5, detokenize=False)
        final = None
        async for output in self._client.generate(
            TokensPrompt(prompt_token_ids=token_ids), params, f"alter-canary-{uuid.uuid4()}"
        ):
            final = output
        assert final is not None
        logprobs = final.outputs[0].logprobs
        assert logprobs
        return {token: entry.logprob for token, entry in logprobs[0].items()}

    async def _rpc(self, method: str, *args: Any) -> list[Any]:
        results = await self._client.collective_rpc(method, timeout=_RPC_TIMEOUT_S, args=args)
        if not results:
            raise EngineError(f"No worker answered {method}")
        return list(results)


def _max_difference(before: dict[int, float], after: dict[int, float]) -> float:
    """Largest change of a log-probability; a token that fell out of the list counts as changed by 1 nat."""
    return max(
        abs(logprob - after[token]) if token in after else max(1.0, _MIN_CANARY_CHANGE)
        for token, logprob in before.items()
    )
