"""Runs a real vLLM engine with ALTER installed, for tests: a synchronous face on `AsyncLLM`."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from alter_core import ForgetExpert, Substrate
from server.engine.base import SwitchReport
from server.engine.vllm_engine import VllmForgetEngine

from .tiny import TinyBundles

T = TypeVar("T")
TIMEOUT_S = 300


@dataclasses.dataclass(frozen=True)
class Route:
    """What the engine recorded about one token."""

    position: int
    expert: int
    """With the largest weight; -1 for none."""
    weight: float
    entropy: float

    @classmethod
    def of(cls, position: int, entropy: float, weights: Sequence[tuple[int, float]]) -> Route:
        """From the experts of the sum, by index."""
        expert, weight = max(weights, key=lambda each: each[1], default=(-1, 0.0))
        return cls(position, expert, weight, entropy)


class EngineRun:
    """One engine. `close()` it."""

    def __init__(self, bundles: TinyBundles, *, max_domains: int = 4, **engine_args: Any) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.bundles = bundles
        self.substrate = Substrate.read(bundles.substrate)
        self.max_domains = max_domains
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._ids = itertools.count()
        defaults: dict[str, Any] = {
            "model": str(bundles.model),
            "skip_tokenizer_init": True,
            "max_model_len": 512,
            "max_num_seqs": 16,
            "dtype": "bfloat16",
            "async_scheduling": False,
            "disable_log_stats": True,
            "worker_cls": "server.engine.worker.AlterCPUWorker",
            "scheduler_cls": "server.engine.scheduler.AlterScheduler",
            "additional_config": {
                "alter": {"substrate": str(bundles.substrate), "max_domains": max_domains}
            },
        }
        args = AsyncEngineArgs(**(defaults | engine_args))

        async def start() -> AsyncLLM:
            return AsyncLLM.from_engine_args(args)

        self.client = self.run(start())
        self.engine = VllmForgetEngine(self.client)
        self.epoch = 0

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the engine's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(TIMEOUT_S)

    def close(self) -> None:
        """Stops the engine and its loop."""

        async def stop() -> None:
            self.client.shutdown()
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)
        self._loop.close()

    def activate(self, slot: int, name: str, **options: Any) -> SwitchReport:
        """Puts an expert of the bundles into a slot."""
        folder = self.bundles.experts[name]
        digest = ForgetExpert.read(folder, self.substrate).digest
        return self._switch(slot, folder, digest, **options)

    def revoke(self, slot: int) -> SwitchReport:
        """Empties a slot."""
        return self._switch(slot, None, None)

    def _switch(
        self, slot: int, bundle: Path | None, digest: str | None, **options: Any
    ) -> SwitchReport:
        self.epoch += 1
        return self.run(
            self.engine.switch(epoch=self.epoch, slot=slot, bundle=bundle, digest=digest, **options)
        )

    def revoke_all(self) -> None:
        """Empties every occupied slot."""
        digests = self.run(self.engine.state()).digests
        for slot, digest in enumerate(digests):
            if digest is not None:
                self.revoke(slot)

    async def stream(self, prompt: list[int], num_tokens: int, **params: Any) -> AsyncIterator[Any]:
        """Greedy generation of exactly `num_tokens`, output by output."""
        from vllm import SamplingParams, TokensPrompt

        sampling = SamplingParams(
            **(
                {
                    "temperature": 0.0,
                    "max_tokens": num_tokens,
                    "ignore_eos": True,
                    "detokenize": False,
                }
                | params
            )
        )
        prompt_input = TokensPrompt(prompt_token_ids=prompt)
        async for output in self.client.generate(prompt_input, sampling, f"test-{next(self._ids)}"):
            yield output

    async def _finish(self, prompt: list[int], num_tokens: int, **params: Any) -> Any:
        final = None
        async for output in self.stream(prompt, num_tokens, **params):
            final = output
        return final

    def generate(self, prompts: list[list[int]], num_tokens: int, **params: Any) -> list[list[int]]:
        """Greedy completions of all prompts at once, in one batch as far as it fits."""

        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*(self._finish(p, num_tokens, **params) for p in prompts))

        return [list(output.outputs[0].token_ids) for output in self.run(all_of_them())]

    def prompt_logprobs(self, tokens: list[int]) -> list[float]:
        """Log-probability of every token but the first, teacher-forced."""
        output = self.run(self._finish(tokens, 1, prompt_logprobs=0))
        return [
            entry[token].logprob
            for token, entry in zip(tokens[1:], output.prompt_logprobs[1:], strict=True)
        ]

    def routes(self, prompts: list[list[int]]) -> list[list[Route]]:
        """Routes of every computed token of each prompt."""
        return self.routes_and_completions(prompts, 1)[0]

    def routes_and_completions(
        self, prompts: list[list[int]], num_tokens: int
    ) -> tuple[list[list[Route]], list[list[int]]]:
        """Routes of every computed token of each request, by position, and the completions."""
        first = next(self._ids) + 1
        self.run(self.engine._rpc("alter_trace", ""))
        completions = self.generate(prompts, num_tokens)
        rows = self.run(self.engine._rpc("alter_trace", None))[0]
        by_request: dict[str, dict[int, Route]] = {}
        for row in rows:
            # vLLM appends a random suffix to request ids.
            name = "-".join(row["request"].split("-")[:2])
            for offset, (entropy, weights) in enumerate(
                zip(row["entropy"], row["weights"], strict=True)
            ):
                position = row["start"] + offset
                by_request.setdefault(name, {})[position] = Route.of(position, entropy, weights)
        routes = [
            [route for _, route in sorted(by_request[f"test-{first + index}"].items())]
            for index in range(len(prompts))
        ]
        return routes, completions

    def preemptions(self) -> int:
        """Requests preempted so far, as vLLM's own metric says."""
        from vllm.v1.metrics.reader import Counter, get_metrics_snapshot

        return sum(
            int(metric.value)
            for metric in get_metrics_snapshot()
            if isinstance(metric, Counter) and metric.name == "vllm:num_preemptions"
        )


def running(bundles: TinyBundles, **engine_args: Any) -> Iterator[EngineRun]:
    """For fixtures: `yield from running(...)`."""
    run = EngineRun(bundles, **engine_args)
    try:
        yield run
    finally:
        run.close()
