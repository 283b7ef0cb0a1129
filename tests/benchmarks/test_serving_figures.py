from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving.blocks import Result
from benchmarks.serving.figures import BARS, figures_of
from benchmarks.serving.floor import floor_of
from benchmarks.serving.models import SHAPES, Sizes
from benchmarks.serving.report import write_report
from benchmarks.serving.settings import FULL
from benchmarks.serving.spread import Spread, percentile, ratios

SETTINGS = dataclasses.replace(FULL, dtype="bfloat16")
"""On every machine."""

MEASURED = {"measured_at": "2026-01-01T00:00:00+00:00", "load_before": 0.1, "seconds": 5.0}


def _offline(*engines: str) -> Result:
    """Base at 100, 200 and 400 tokens a second; the others slower the further back they stand."""
    cases = [f"decode_b{b}_{kind}" for b in (1, 16, 64) for kind in ("retain", "mixed", "forget")]
    cases += [f"prefill_{length}_{kind}" for length in (512, 2048) for kind in ("retain", "forget")]
    base = {case: [100.0, 400.0, 200.0] for case in cases}
    rates = {"base": base}
    for place, engine in enumerate(engines, start=1):
        factor = 1 - 0.1 * place
        rates[engine] = {
            case: [rate * (factor - 0.05 * ("2048" in case)) for rate in found]
            for case, found in base.items()
        }
    return MEASURED | {
        "rates": rates,
        "expert_share": {},
        "memory_bytes": dict.fromkeys(rates, 2**30),
    }


def _scale() -> Result:
    floor = floor_of(Sizes.of(SHAPES["150m"]), value_bytes=SETTINGS.value_bytes)
    result = _offline("n1", "n256")
    tensors = 255 * (floor.b_bytes + floor.head_bytes)
    tables = 256 * 8192 * 5 * 64 * 2  # 264 columns, less 8 that one domain has too
    result["memory_bytes"]["n256"] += 1.04 * (tensors + tables)
    return result


def _switch() -> Result:
    return MEASURED | {
        "step_s": 0.02,
        "gap_beyond_step_s": [0.01, 0.02, 0.03],
        "gap_before_s": [0.001, 0.002, 0.003],
        "pause_s": [0.005, 0.006, 0.007],
        "tokens_in_flight": [900, 1000, 1100],
        "kept_requests": [14, 15, 16],
        "recomputed_requests": [2, 1, 0],
        "recomputed_tokens": [120, 60, 0],
        "post_to_active_s": [0.5, 0.3],
        "delete_to_revoked_s": [0.2],
        "bundle_bytes": 20 * 2**20,
        "memory_bytes_before": 2**30,
        "memory_bytes_after": 2**30,
    }


def _online() -> Result:
    base = {"ttft_s": [0.1] * 99 + [0.2], "inter_token_s": [0.01] * 5, "goodput": 2.0}
    ours = base | {"ttft_s": [0.11] * 99 + [0.22]}
    return MEASURED | {
        "arrivals": "drawn",
        "requests": 100,
        "mean_prompt_tokens": 250.0,
        "mean_answer_tokens": 50.0,
        "rate_per_s": 3.0,
        "share_on_experts": 0.1,
        "rounds": {"base": [base, base], "ours": [ours, ours]},
    }


def _startup() -> Result:
    rounds = {"start_s": [50.0, 60.0], "memory_bytes": [2**30, 2**30]}
    return MEASURED | {"rounds": {"base": rounds, "ours": rounds}}


RESULTS: dict[str, Result] = {
    "offline-150m": _offline("lora", "n8"),
    "scale-150m": _scale(),
    "switch-150m": _switch(),
    "activation-150m": _switch() | {"post_to_active_s": [0.9, 0.7]},
    "online_mixed-150m": _online(),
    "startup-150m": _startup(),
    "offline-25m": _offline("lora", "n8"),
}


def test_named_figures_are_ratios_of_the_headline_model_round_by_round() -> None:
    values = figures_of(RESULTS, SETTINGS).values
    assert values["vllm_lora_ratio_b16"] == pytest.approx(0.9)
    assert values["decode_ratio_b64_retain"] == pytest.approx(0.8)
    assert values["decode_ratio_b16_mixed"] == pytest.approx(0.8)
    assert values["prefill_ratio_retain"] == pytest.approx(0.75)  # the longer prompt's
    assert values["n256_over_n1"] == pytest.approx(0.8 / 0.9, rel=1e-3)
    assert values["ttft_p99_ratio"] == pytest.approx(1.1, rel=1e-3)
    assert values["post_to_active_s"] == pytest.approx(0.8)
    assert values["switch_gap_p99_ms"] == pytest.approx(29.8)
    assert values["150m/switch/gap_before_p99_ms"] == pytest.approx(2.98)
    assert values["150m/scale/slot_memory_over_tensors"] == pytest.approx(1.04, abs=0.001)
    assert values["150m/scale/slot_memory_over_experts"] > 3
    assert values["150m/scale/router_tables_mib"] == pytest.approx(1280)


def test_names_are_those_of_the_issue_and_gpu_ones_are_null_with_a_reason() -> None:
    found = figures_of(RESULTS, SETTINGS)
    plain = [name for name in found.values if "/" not in name]
    assert plain == [name for bar in BARS for name in (bar, f"gpu_{bar}")]
    gpu = [name for name in plain if name.startswith("gpu_")]
    assert all(found.values[name] is None for name in gpu)
    assert {found.not_measured[name] for name in gpu} == {"no GPU was lent"}


def test_figure_of_a_block_that_was_not_run_is_null_with_a_reason() -> None:
    found = figures_of({"offline-150m": RESULTS["offline-150m"]}, SETTINGS)
    assert found.values["switch_gap_p99_ms"] is None
    assert "not measured" in found.not_measured["switch_gap_p99_ms"]
    assert found.values["decode_ratio_b1_retain"] == pytest.approx(0.8)


def test_every_named_figure_is_measured_by_a_full_run() -> None:
    found = figures_of(RESULTS, SETTINGS)
    assert [name for name in BARS if found.values[name] is None] == []


def test_page_has_every_figure_its_bar_and_its_plots(tmp_path: Path) -> None:
    path = write_report(tmp_path, "serving", RESULTS, SETTINGS, failed=["n64-25m"])
    content: dict[str, Any] = json.loads(path.read_text())
    assert content["figures"]["decode_ratio_b64_retain"] == pytest.approx(0.8)
    assert content["notes"]["active domains of the named figures"] == 8
    page = path.with_suffix(".md").read_text()
    assert "| `decode_ratio_b64_retain` | 0.8 | 0.8 | 0.8 | >= 0.97 |" in page
    assert "`25m/offline/n8/decode_b1_forget`" in page
    assert "n64-25m" in page
    for plot in ("throughput", "latency", "switch"):
        assert f"(serving-{plot}.png)" in page
        assert (tmp_path / f"serving-{plot}.png").stat().st_size > 1000


def test_ratios_are_taken_within_a_round_so_that_a_slow_round_changes_nothing() -> None:
    found = ratios([9.0, 90.0, 19.0], [10.0, 100.0, 20.0])
    assert dataclasses.astuple(found) == (0.9, 0.9, 0.95)


def test_spread_of_an_even_number_of_rounds_is_the_mean_of_the_middle() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0]) == Spread(median=2.5, low=1.0, high=4.0)


def test_percentile_is_interpolated() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 10.0], 99) == pytest.approx(9.9)
