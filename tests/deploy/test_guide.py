"""Numbers of docs/deploy.md that follow from formulas are worked out again here."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from alter_core.bundle import SiteInfo
from alter_core.config import AlterConfig
from alter_core.sites import default_tap_layer
from server.engine.evidence_tables import cache_bytes
from server.memory import SlotCost
from server.registry.registry import DEFAULT_CLOCK_MARGIN_S, DEFAULT_LEASE_S, DEFAULT_POLL_S

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "deploy.md").read_text()
TEXT = " ".join(GUIDE.split())
"""In one line."""
SLOTS = 64


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes as in the published configuration."""

    name: str
    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int
    vocab: int
    ranks: int = 1

    def sites(self) -> dict[str, SiteInfo]:
        """Every adapted site of the default configuration."""
        shapes = {
            "qkv": (self.hidden, (self.heads + 2 * self.kv_heads) * self.head),
            "o": (self.heads * self.head, self.hidden),
            "gate_up": (self.hidden, 2 * self.inner),
            "down": (self.inner, self.hidden),
        }
        return {
            f"layers.{layer}.{kind}": SiteInfo(in_features=i, out_features=o)
            for layer in range(default_tap_layer(self.layers), self.layers)
            for kind, (i, o) in shapes.items()
        }


MODELS = (
    Model("Qwen3-0.6B", 28, 1024, 3072, 16, 8, 128, 151_936),
    Model("Llama-3.2-1B", 16, 2048, 8192, 32, 8, 64, 128_256),
    Model("Llama-3-8B", 32, 4096, 14_336, 32, 8, 128, 128_256),
    Model("Llama-3-70B, 8 ranks", 80, 8192, 28_672, 64, 8, 128, 128_256, 8),
)


def cost(model: Model, *, is_cpu: bool) -> SlotCost:
    config = AlterConfig(tap_layer=default_tap_layer(model.layers))
    cache = cache_bytes(config, vocab_size=model.vocab, max_domains=SLOTS) if is_cpu else 0
    return SlotCost.estimate(
        config,
        model.sites(),
        hidden_size=model.hidden,
        tensor_parallel_size=model.ranks,
        value_bytes=2,
        cache_bytes=cache,
    )


def megabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.0f}" if num_bytes >= 1e7 else f"{num_bytes / 1e6:.1f}"


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_memory_of_slots(model: Model) -> None:
    found, on_cpu = cost(model, is_cpu=False), cost(model, is_cpu=True)
    whole = cost(dataclasses.replace(model, ranks=1), is_cpu=False)
    bundle = whole.expert_bytes + whole.head_bytes
    cells = (
        model.name,
        megabytes(found.expert_bytes),
        megabytes(found.head_bytes),
        f"{found.total(SLOTS) / 1e9:.1f}",
        f"{on_cpu.cache_bytes / 1e9:.1f}" if model.ranks == 1 else "-",
        megabytes(bundle),
    )
    assert "| " + " | ".join(cells) + " |" in GUIDE


@pytest.mark.parametrize("num_servers", [2, 10, 100])
def test_load_of_the_registry(num_servers: int) -> None:
    commits = num_servers * 3 / DEFAULT_LEASE_S
    reads = num_servers / DEFAULT_POLL_S
    assert f"| {num_servers} | {commits:.1f} | {reads:.0f} | {num_servers * 16} |" in GUIDE


def test_the_longest_wait_for_a_change() -> None:
    assert f"{DEFAULT_LEASE_S + DEFAULT_CLOCK_MARGIN_S:.0f} s" in GUIDE


def test_bandwidth_of_a_change() -> None:
    eight = cost(MODELS[2], is_cpu=False)
    bundle = eight.expert_bytes + eight.head_bytes
    assert f"{bundle * 100 / 1e9:.1f} GB for 100 servers of an 8B" in TEXT


def test_measured_numbers_stand_in_the_results() -> None:
    faults = json.loads((ROOT / "docs" / "results" / "faults.json").read_text())["figures"]
    serving = json.loads((ROOT / "docs" / "results" / "serving.json").read_text())["figures"]
    assert f"{faults['barrier_p99_ms']:.0f} ms" in TEXT
    assert f"{serving['post_to_active_s']:.1f} s" in TEXT
    assert f"{serving['switch_gap_p99_ms']:.0f} ms" in TEXT


def test_every_metric_is_listed() -> None:
    from .test_observability import our_metrics

    families = {
        re.sub(r"_(bucket|sum|count)$", "", name)
        for name in our_metrics()
        if not name.endswith("_created")
    }
    listed = set(re.findall(r"`(alter_\w+)", GUIDE))
    assert listed == families
