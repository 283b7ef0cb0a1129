"""Decode and prefill throughput of several engines that take turns in one process: the offline blocks.

All engines hold a batch that they decode, and are stepped by turns, a slice of a few steps each: a machine
whose speed wanders slows neighbours alike. Prompts are computed by turns too, one at a time.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import time
from argparse import Namespace
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

# An engine is stepped from here: its core is no process of its own.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

from alter_core import Substrate, read_manifest
from alter_core.errors import EngineError
from server.launch import configure
from server.settings import ServeSettings

from .artefacts import Artefacts
from .names import TokenIds
from .processes import tree_memory_bytes
from .settings import RANK, BenchSettings
from .traffic import Traffic, TrafficKind

BASE, LORA = "base", "lora"
MAX_MODEL_LEN = 2304
_MAX_BATCH = 64
_SETTLE_S = 0.1
"""Between turns: threads of the engine before spin for a while."""
_WARM_UP_TOKENS = 256
_MIN_FORGET_SHARE = 0.75
"""Least share of tokens on an expert in forget traffic: all but a prompt's first, up to a name."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of turn."""

    phase: str
    """`decode` or `prefill`."""
    size: int
    """Requests of a batch, or tokens of a prompt."""
    kind: TrafficKind
    repeats: int

    @property
    def name(self) -> str:
        """In results, e.g. `decode_b16_retain`, `prefill_512_forget`."""
        return f"{self.phase}_{'b' if self.phase == 'decode' else ''}{self.size}_{self.kind}"


def cases_of(settings: BenchSettings) -> list[Case]:
    """Every batch size and prompt length, by kind of traffic. One request alone is never mixed."""
    decode = [
        Case(phase="decode", size=batch, kind=kind, repeats=repeats)
        for batch, repeats in settings.decode_repeats.items()
        for kind in TrafficKind
        if not (kind is TrafficKind.MIXED and batch == 1)
    ]
    prefill = [
        Case(phase="prefill", size=length, kind=kind, repeats=repeats)
        for length, repeats in settings.prefill_repeats.items()
        for kind in (TrafficKind.RETAIN, TrafficKind.FORGET)
    ]
    return decode + prefill


_numbers = itertools.count()


class Engine:
    """A vLLM engine, stepped from this process."""

    def __init__(
        self, name: str, made: Artefacts, dtype: str, num_domains: int = 0, **options: Any
    ) -> None:
        """`name` is `base`, `lora`, or any other for an engine with that many active domains."""
        self.name = name
        self.num_domains = num_domains
        self.traffic = Traffic(made.prose, made.names, num_domains=num_domains or 1)
        self.expert_share: dict[str, float] = {}
        """Share of tokens on forget experts in the last round, by case; ours alone has any."""
        self._adapter: LoRARequest | None = None
        if name == LORA:
            self._adapter = LoRARequest("random", 1, str(made.adapter()))
            options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": RANK}
        elif num_domains:
            family = made.family(num_domains)
            options |= _alter_options(family.substrate, num_domains)
        before, started = tree_memory_bytes(os.getpid()), time.monotonic()
        self.llm = LLM(
            model=str(made.model),
            dtype=dtype,
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=_MAX_BATCH,
            enable_prefix_caching=False,
            **options,
        )
        self.start_s = time.monotonic() - started
        if num_domains:
            self._activate(family.experts)
        gc.collect()
        self.memory_bytes = tree_memory_bytes(os.getpid()) - before
        """By which the benchmark has grown, before any request: without what the router's tables take as
        tokens appear. The first engine of a process bears what all share."""

    def _activate(self, bundles: Sequence[Path]) -> None:
        for slot, bundle in enumerate(bundles):
            digest = read_manifest(bundle).digest
            self.llm.collective_rpc("alter_stage", args=(str(bundle), digest))
            self.llm.collective_rpc("alter_commit", args=(slot + 1, slot, digest))
        (state,) = self.llm.collective_rpc("alter_state")
        if None in state["digests"]:
            raise EngineError(
                "Not every domain is active",
                expected=str(len(bundles)),
                got=str(len(bundles) - state["digests"].count(None)),
            )

    def stop(self) -> None:
        """Ends its processes."""
        self.llm.llm_engine.engine_core.shutdown()

    def takes(self, case: Case) -> bool:
        """vLLM's LoRA is measured on retain traffic alone: every request is on the adapter anyway."""
        return self.name != LORA or case.kind is TrafficKind.RETAIN

    def prompts(self, case: Case, settings: BenchSettings, start: int) -> list[TokenIds]:
        """Of a batch that is decoded, or the one that is computed; `start` numbers the first."""
        is_prefill = case.phase == "prefill"
        lengths = [case.size] if is_prefill else [settings.decode_prompt_tokens] * case.size
        return self.traffic.prompts(case.kind, lengths, start=start)

    def tokens_by_expert(self) -> tuple[int, int]:
        """(on forget experts, all) computed so far."""
        if not self.num_domains:
            return 0, 0
        (counts,) = self.llm.collective_rpc("alter_routed_tokens")
        return sum(map(sum, counts[1:])), sum(map(sum, counts))

    def begin(self, prompts: Sequence[TokenIds], num_tokens: int) -> None:
        """Takes requests of so many tokens each, up to the first token of every one."""
        params = SamplingParams(
            temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
        )
        for ids in prompts:
            self.llm.llm_engine.add_request(
                f"{next(_numbers)}",
                TokensPrompt(prompt_token_ids=ids),
                params,
                lora_request=self._adapter,
            )
        begun: set[str] = set()
        while len(begun) < len(prompts):
            begun.update(output.request_id for output in self.llm.llm_engine.step())

    def decode_rate(self, num_steps: int) -> float:
        """Tokens a second of so many steps, after one more that is not timed: it fills what overlaps."""
        step = self.llm.llm_engine.step
        step()
        started = time.perf_counter()
        num_tokens = sum(len(step()) for _ in range(num_steps))
        return num_tokens / (time.perf_counter() - started)

    def prefill_rate(self, prompt: TokenIds) -> float:
        """Prompt tokens a second, after a short prompt that is not timed."""
        self.begin([prompt[:_WARM_UP_TOKENS]], 1)
        started = time.perf_counter()
        self.begin([prompt], 1)
        return len(prompt) / (time.perf_counter() - started)


def take_turns(
    engines: Sequence[Engine], case: Case, settings: BenchSettings, *, start: int
) -> dict[str, list[float]]:
    """Tokens a second of each engine, turn by turn; `start` numbers the first prompt.

    Raises: EngineError if requests are left.
    """
    before = {engine.name: engine.tokens_by_expert() for engine in engines}
    rates: dict[str, list[float]] = {engine.name: [] for engine in engines}
    for repeat in range(case.repeats):
        prompts = {e.name: e.prompts(case, settings, start + repeat * case.size) for e in engines}
        if case.phase == "prefill":
            for engine in _rotated(engines, repeat):
                rates[engine.name].append(engine.prefill_rate(prompts[engine.name][0]))
            continue
        num_steps, num_turns = settings.decode_turns(case.size)
        for engine in engines:
            engine.begin(prompts[engine.name], 1 + num_turns * (1 + num_steps))
        for turn in range(num_turns):
            for engine in _rotated(engines, turn):
                time.sleep(_SETTLE_S)
                rates[engine.name].append(engine.decode_rate(num_steps))
        if left := [e.name for e in engines if e.llm.llm_engine.has_unfinished_requests()]:
            raise EngineError("Requests are not at their end", expected="none", got=", ".join(left))
    for engine in engines:
        if engine.num_domains:
            on_experts, total = (
                b - a for a, b in zip(before[engine.name], engine.tokens_by_expert(), strict=True)
            )
            engine.expert_share[case.name] = on_experts / total
    return rates


def _rotated(engines: Sequence[Engine], by: int) -> list[Engine]:
    first = by % len(engines)
    return [*engines[first:], *engines[:first]]


def _alter_options(substrate: Path, max_domains: int) -> dict[str, Any]:
    """The engine arguments that `alter serve` would set."""
    args = Namespace(additional_config=None)
    settings = ServeSettings(substrate=substrate, max_domains=max_domains)
    configure(args, settings, Substrate.read(substrate))
    chosen = ("worker_cls", "scheduler_cls", "additional_config", "async_scheduling")
    return {name: getattr(args, name) for name in chosen}


def measure(
    made: Artefacts,
    settings: BenchSettings,
    *,
    num_domains: Sequence[int],
    kinds: Collection[TrafficKind],
    has_lora: bool,
) -> dict[str, Any]:
    """Rates of base, of vLLM's LoRA if asked for, and of ours with each number of active domains.

    Raises: EngineError if tokens were not routed as the traffic's kind says.
    """
    names = [(BASE, 0), *((f"n{count}", count) for count in num_domains)]
    cases = [case for case in cases_of(settings) if case.kind in kinds]
    # A process has room for one installation of ALTER.
    options = {"distributed_executor_backend": "mp"} if len(num_domains) > 1 else {}
    rates: dict[str, dict[str, list[float]]] = {}
    found: dict[str, dict[str, Any]] = {"expert_share": {}, "memory_bytes": {}, "start_s": {}}
    number = 0
    for start in range(settings.starts):
        # Another engine is up first each time. vLLM's LoRA, far from the others and slow, runs once.
        at = start % len(names)
        order = names[at:] + names[:at] + ([(LORA, 0)] if has_lora and start == 0 else [])
        engines = [Engine(name, made, settings.dtype, count, **options) for name, count in order]
        for _ in range(settings.rounds):
            for case in cases:
                taking = [e for e in _rotated(engines, number) if e.takes(case)]
                found_rates = take_turns(taking, case, settings, start=number * _MAX_BATCH)
                for name, values in found_rates.items():
                    print(number, case.name, name, *(f"{v:.1f}" for v in values), flush=True)
                    rates.setdefault(name, {}).setdefault(case.name, []).extend(values)
            number += 1
        for engine in engines:
            # Of the first start: later ones find memory that earlier ones have let go of.
            found["memory_bytes"].setdefault(engine.name, engine.memory_bytes)
            found["start_s"].setdefault(engine.name, engine.start_s)
            if engine.num_domains:
                found["expert_share"][engine.name] = engine.expert_share
            engine.stop()
    _check_shares(found["expert_share"])
    return {"rates": rates, "num_domains": dict(names), **found}


def _check_shares(shares: Mapping[str, Mapping[str, float]]) -> None:
    for engine, by_case in shares.items():
        for case, share in by_case.items():
            is_forget = case.endswith(TrafficKind.FORGET)
            is_retain = case.endswith(TrafficKind.RETAIN)
            if (is_retain and share > 0) or (is_forget and share < _MIN_FORGET_SHARE):
                raise EngineError(
                    f"{engine} did not route {case} as that traffic is to be routed",
                    expected="no token" if is_retain else f"{_MIN_FORGET_SHARE:.0%} of tokens",
                    got=f"{share:.1%} of tokens on experts",
                )
