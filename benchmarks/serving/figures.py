"""From the blocks' results to the figures of `docs/results/serving.json`.

Figures with plain names are the headline model's, with `num_domains` active. Beside them stands every
measurement as MODEL/BLOCK/..., ratios to base of the same round in the same process.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from alter_core import AlterConfig
from server.engine.evidence_tables import cache_bytes

from .blocks import Result
from .floor import floor_of
from .models import SHAPES, Sizes
from .settings import BenchSettings
from .spread import Spread, percentile, ratios
from .traffic import TrafficKind

BARS = {
    "decode_ratio_b64_retain": ">= 0.97",
    "decode_ratio_b16_retain": ">= 0.97",
    "decode_ratio_b1_retain": ">= 0.95",
    "prefill_ratio_retain": ">= 0.97",
    "decode_ratio_b64_forget": ">= 0.90",
    "decode_ratio_b16_forget": ">= 0.85",
    "decode_ratio_b1_forget": ">= 0.80",
    "decode_ratio_b16_mixed": "",
    "vllm_lora_ratio_b64": "below ours",
    "vllm_lora_ratio_b16": "below ours",
    "vllm_lora_ratio_b1": "below ours",
    "n256_over_n1": ">= 0.98",
    "ttft_p99_ratio": "<= 1.05",
    "switch_gap_p99_ms": "<= 30",
    "post_to_active_s": "<= 1",
}
"""What each figure is to reach."""
GPU_PREFIX = "gpu_"
NO_GPU = "no GPU was lent"


@dataclasses.dataclass(kw_only=True)
class Figures:
    """Values by name, and what is known of them."""

    values: dict[str, float | None] = dataclasses.field(default_factory=dict)
    spread: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    not_measured: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, name: str, found: Spread | float) -> None:
        """A figure, rounded to four digits."""
        if isinstance(found, Spread):
            self.spread[name] = (_rounded(found.low), _rounded(found.high))
            found = found.median
        self.values[name] = _rounded(found)

    def leave_out(self, name: str, reason: str) -> None:
        """A figure that was not measured."""
        self.values[name], self.not_measured[name] = None, reason


def figures_of(results: Mapping[str, Result], settings: BenchSettings) -> Figures:
    """All figures of what was measured, the named ones first; `results` by block name."""
    details = Figures()
    for name, result in results.items():
        kind, model = name.rsplit("-", 1)
        if "rates" in result:
            _add_offline(details, f"{model}/{kind}", result)
        elif kind.startswith("online"):
            _add_online(details, f"{model}/{kind}", result)
        elif "gap_beyond_step_s" in result:
            _add_switch(details, f"{model}/{kind}", result)
        else:
            _add_startup(details, f"{model}/{kind}", result)
        if kind == "scale":
            _add_scale(details, model, result, settings)
    named = Figures()
    for name in BARS:
        source = _source(name, settings)
        if source in details.values:
            named.values[name] = details.values[source]
        else:
            named.leave_out(name, "its block was not measured in this run")
        if source in details.spread:
            named.spread[name] = details.spread[source]
        named.leave_out(GPU_PREFIX + name, NO_GPU)
    return Figures(
        values=named.values | details.values,
        spread=named.spread | details.spread,
        not_measured=named.not_measured,
    )


def _source(name: str, settings: BenchSettings) -> str:
    """The detail that a named figure is."""
    model = settings.headline_model
    ours = f"{model}/offline/n{settings.num_domains}"
    match name.split("_"):
        case ["decode", "ratio", batch, kind]:
            return f"{ours}/decode_{batch}_{kind}"
        case ["vllm", "lora", "ratio", batch]:
            return f"{model}/offline/lora/decode_{batch}_{TrafficKind.RETAIN}"
        case ["prefill", "ratio", kind]:
            return f"{ours}/prefill_lowest_{kind}"
        case ["n256", "over", "n1"]:
            return f"{model}/scale/n256_over_n1"
        case ["ttft", "p99", "ratio"]:
            return f"{model}/online_{TrafficKind.MIXED}/ttft_p99_ratio"
        case ["switch", "gap", "p99", "ms"]:
            return f"{model}/switch/gap_p99_ms"
        case ["post", "to", "active", "s"]:
            return f"{model}/activation/post_to_active_s"
    raise AssertionError(name)


def _add_offline(figures: Figures, prefix: str, result: Result) -> None:
    base = result["rates"]["base"]
    for case, rates in base.items():
        figures.add(f"{prefix}/base/{case}_tokens_per_s", Spread.of(rates))
    for engine, by_case in result["rates"].items():
        if engine == "base":
            continue
        found = {case: ratios(rates, base[case]) for case, rates in by_case.items()}
        for case, ratio in found.items():
            figures.add(f"{prefix}/{engine}/{case}", ratio)
        for kind in (TrafficKind.RETAIN, TrafficKind.FORGET):
            prefill = [
                ratio
                for case, ratio in found.items()
                if case.startswith("prefill_") and case.endswith(kind)
            ]
            if prefill:
                figures.add(f"{prefix}/{engine}/prefill_lowest_{kind}", _lowest(prefill))


def _add_scale(figures: Figures, model: str, result: Result, settings: BenchSettings) -> None:
    few, many = (f"n{count}" for count in (settings.few_domains, settings.many_domains))
    found = [
        ratios(rates, result["rates"][few][case])
        for case, rates in result["rates"][many].items()
        if case.startswith("decode_") and case.endswith(TrafficKind.RETAIN)
    ]
    figures.add(f"{model}/scale/{many}_over_{few}", _lowest(found))
    shape, added = SHAPES[model], settings.many_domains - settings.few_domains
    floor = floor_of(Sizes.of(shape), value_bytes=settings.value_bytes)
    more = result["memory_bytes"][many] - result["memory_bytes"][few]
    tensors = added * (floor.b_bytes + floor.head_bytes)
    # The whole vocabulary of these models is in the router's tables from the start.
    table_bytes = functools.partial(
        cache_bytes, AlterConfig(tap_layer=0), vocab_size=shape.vocab_size
    )
    tables = table_bytes(max_domains=settings.many_domains)
    tables -= table_bytes(max_domains=settings.few_domains)
    figures.add(f"{model}/scale/slot_memory_over_tensors", more / (tensors + tables))
    figures.add(f"{model}/scale/slot_memory_over_experts", more / tensors)
    figures.add(f"{model}/scale/router_tables_mib", tables / 2**20)


def _add_online(figures: Figures, prefix: str, result: Result) -> None:
    rounds = result["rounds"]
    for quantity, name in (("ttft_s", "ttft"), ("inter_token_s", "inter_token")):
        for percent in (50, 99):
            by_server = {
                server: [percentile(found[quantity], percent) for found in replays]
                for server, replays in rounds.items()
            }
            for server, values in by_server.items():
                milliseconds = [value * 1000 for value in values]
                figures.add(f"{prefix}/{server}/{name}_p{percent}_ms", Spread.of(milliseconds))
            figures.add(
                f"{prefix}/{name}_p{percent}_ratio", ratios(by_server["ours"], by_server["base"])
            )
    for server, replays in rounds.items():
        goodput = [found["goodput"] for found in replays]
        figures.add(f"{prefix}/{server}/goodput_per_s", Spread.of(goodput))
    figures.add(f"{prefix}/rate_per_s", result["rate_per_s"])


def _add_switch(figures: Figures, prefix: str, result: Result) -> None:
    gaps = [gap * 1000 for gap in result["gap_beyond_step_s"]]
    figures.add(
        f"{prefix}/gap_p99_ms",
        Spread(median=percentile(gaps, 99), low=min(gaps), high=max(gaps)),
    )
    figures.add(f"{prefix}/gap_p50_ms", median(gaps))
    before = [gap * 1000 for gap in result["gap_before_s"]]
    figures.add(
        f"{prefix}/gap_before_p99_ms",
        Spread(median=percentile(before, 99), low=min(before), high=max(before)),
    )
    figures.add(f"{prefix}/step_ms", result["step_s"] * 1000)
    figures.add(f"{prefix}/pause_ms", Spread.of(p * 1000 for p in result["pause_s"]))
    for count in ("tokens_in_flight", "kept_requests", "recomputed_requests", "recomputed_tokens"):
        figures.add(f"{prefix}/{count}", Spread.of(result[count]))
    figures.add(f"{prefix}/post_to_active_s", Spread.of(result["post_to_active_s"]))
    figures.add(f"{prefix}/delete_to_revoked_s", Spread.of(result["delete_to_revoked_s"]))
    figures.add(f"{prefix}/bundle_mib", result["bundle_bytes"] / 2**20)
    for moment in ("before", "after"):
        figures.add(f"{prefix}/memory_mib_{moment}", result[f"memory_bytes_{moment}"] / 2**20)


def _add_startup(figures: Figures, prefix: str, result: Result) -> None:
    for server, found in result["rounds"].items():
        figures.add(f"{prefix}/{server}/start_s", Spread.of(found["start_s"]))
        mebibytes: list[Any] = [size / 2**20 for size in found["memory_bytes"]]
        figures.add(f"{prefix}/{server}/memory_mib", Spread.of(mebibytes))


def _lowest(spreads: Iterable[Spread]) -> Spread:
    """Of several measurements, the one whose median is lowest."""
    return min(spreads, key=lambda spread: spread.median)


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
