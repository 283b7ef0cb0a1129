"""Latency of base and ours under the same replayed arrivals: the online blocks.

Requests are sent and timed by the code behind `vllm bench serve` (`vllm.benchmarks.serve`). It is called as
a library: the command replays timed traces with random tokens as prompts, and here prompts are what routes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm.benchmarks.datasets import SampleRequest
from vllm.benchmarks.serve import TaskType, benchmark
from vllm.utils.gc_utils import freeze_gc_heap

from alter_core.errors import EngineError
from alter_eval.data import default_data_dir

from .artefacts import Artefacts
from .servers import Started, base_server, our_server
from .settings import GOODPUT_MS, BenchSettings
from .trace import Arrival, arrivals_of, at_rate, scaled_lengths
from .traffic import Traffic, TrafficKind

LENGTH_DIVISOR = 8
PROMPT_TOKENS = range(24, 513)
ANSWER_TOKENS = range(2, 129)
BASE, OURS = "base", "ours"


def measure(
    made: Artefacts, settings: BenchSettings, scratch: Path, *, kind: TrafficKind
) -> dict[str, Any]:
    """Both servers are up and take turns; each replay has prompts of its own, the same for both.

    Raises: EngineError if a request fails.
    """
    arrivals, source = arrivals_of(default_data_dir(), settings.online_requests, seed=settings.seed)
    arrivals = scaled_lengths(
        arrivals,
        divisor=LENGTH_DIVISOR,
        prompt_tokens=PROMPT_TOKENS,
        answer_tokens=ANSWER_TOKENS,
    )
    traffic = Traffic(made.prose, made.names, num_domains=settings.num_domains)
    family = made.family(settings.num_domains)
    freeze_gc_heap()
    with (
        base_server(made, scratch / "base.log", settings) as base,
        our_server(made, family, scratch / "ours.log", settings) as ours,
    ):
        at_once = replay(base, arrivals, traffic, kind, number=0, is_timed=False)
        replay(ours, arrivals, traffic, kind, number=0, is_timed=False)
        rate = settings.online_load * at_once["request_throughput"]
        timed = at_rate(arrivals, rate)
        found: dict[str, list[dict[str, Any]]] = {BASE: [], OURS: []}
        for number in range(1, settings.online_rounds + 1):
            servers = [(BASE, base), (OURS, ours)]
            for name, server in servers if number % 2 else reversed(servers):
                result = replay(server, timed, traffic, kind, number=number, is_timed=True)
                found[name].append(result)
        on_experts = _tokens_on_experts(ours)
    num_replays = settings.online_rounds + 1
    computed = num_replays * sum(a.prompt_tokens + a.answer_tokens - 1 for a in arrivals)
    return {
        "arrivals": source,
        "rate_per_s": rate,
        "requests": len(timed),
        "mean_prompt_tokens": sum(a.prompt_tokens for a in timed) / len(timed),
        "mean_answer_tokens": sum(a.answer_tokens for a in timed) / len(timed),
        "num_domains": settings.num_domains,
        "goodput_ms": dict(GOODPUT_MS),
        "share_on_experts": on_experts / computed,
        "rounds": found,
    }


def replay(
    started: Started,
    arrivals: Sequence[Arrival],
    traffic: Traffic,
    kind: TrafficKind,
    *,
    number: int,
    is_timed: bool,
) -> dict[str, Any]:
    """One replay; without times all requests come at once. Raises: EngineError if a request fails."""
    prompts = traffic.prompts(
        kind, [a.prompt_tokens for a in arrivals], start=number * len(arrivals)
    )
    requests = [
        SampleRequest(
            prompt=ids,
            prompt_len=len(ids),
            expected_output_len=arrival.answer_tokens,
            request_id=f"replay-{number}-{place}",
            timestamp=arrival.at_s,
        )
        for place, (arrival, ids) in enumerate(zip(arrivals, prompts, strict=True))
    ]
    url = started.server.url
    result = asyncio.run(
        benchmark(
            task_type=TaskType.GENERATION,
            endpoint_type="openai",
            api_url=f"{url}/v1/completions",
            base_url=url,
            model_id=started.server.model,
            model_name=started.server.model,
            tokenizer=None,
            input_requests=requests,
            logprobs=None,
            request_rate=float("inf"),
            burstiness=1.0,
            disable_tqdm=True,
            num_warmups=0,
            profile=False,
            selected_percentile_metrics=["ttft", "itl"],
            selected_percentiles=[50.0, 99.0],
            ignore_eos=True,
            goodput_config_dict=dict(GOODPUT_MS),
            max_concurrency=None,
            lora_modules=None,
            extra_headers=None,
            extra_body={"temperature": 0},
            ready_check_timeout_sec=0,
            self_timed=is_timed,
        )
    )
    if result["failed"]:
        errors = [error for error in result["errors"] if error]
        raise EngineError(
            f"{result['failed']} of {len(requests)} requests failed",
            got=errors[0][-300:] if errors else None,
            fix=f"See {started.server.log}.",
        )
    return {
        "request_throughput": result["request_throughput"],
        "goodput": result["request_goodput"],
        "ttft_s": result["ttfts"],
        "inter_token_s": [gap for gaps in result["itls"] for gap in gaps],
    }


def _tokens_on_experts(ours: Started) -> int:
    """Tokens that experts computed since the start."""
    with ours.admin() as admin:
        domains = admin.list_domains().domains
    return sum(domain.routed_tokens.high + domain.routed_tokens.low for domain in domains)
