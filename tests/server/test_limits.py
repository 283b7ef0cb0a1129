"""Slots that do not fit and dtypes that cannot be served are refused before any weight is loaded."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from alter_core import AlterConfig, ForgetExpert, Substrate
from alter_core.bundle import SiteInfo
from alter_core.errors import ConfigError
from server import launch, memory
from server.engine.slots import ExpertSlots
from server.memory import Room, SlotCost
from server.settings import ServeSettings
from tests.support.tiny import TinyBundles, load_model, make_bundles

GIB = 1 << 30
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # parse_vllm_args and serve set these; undo that after each test.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> TinyBundles:
    return make_bundles(tmp_path_factory.mktemp("tiny"), num_experts=1)


@pytest.fixture(scope="module")
def substrate(bundles: TinyBundles) -> Substrate:
    return Substrate.read(bundles.substrate)


def cost_of(
    config: AlterConfig,
    layer: dict[str, tuple[int, int]],
    *,
    hidden_size: int,
    num_layers: int,
    tensor_parallel_size: int = 1,
    value_bytes: int = 2,
    cache_bytes: int = 0,
) -> SlotCost:
    sites = {
        f"layers.{index}.{kind}": SiteInfo(in_features=i, out_features=o)
        for index in range(config.tap_layer, num_layers)
        for kind, (i, o) in layer.items()
    }
    return SlotCost.estimate(
        config,
        sites,
        hidden_size=hidden_size,
        tensor_parallel_size=tensor_parallel_size,
        value_bytes=value_bytes,
        cache_bytes=cache_bytes,
    )


QWEN3_600M = {
    "qkv": (1024, 4096),
    "o": (2048, 1024),
    "gate_up": (1024, 6144),
    "down": (3072, 1024),
}
LLAMA3_8B = {
    "qkv": (4096, 6144),
    "o": (4096, 4096),
    "gate_up": (4096, 28672),
    "down": (14336, 4096),
}


def test_a_slot_costs_what_readme_and_help_say() -> None:
    small = cost_of(AlterConfig(tap_layer=9), QWEN3_600M, hidden_size=1024, num_layers=28)
    large = cost_of(AlterConfig(tap_layer=10), LLAMA3_8B, hidden_size=4096, num_layers=32)
    assert [round(cost.expert_bytes / 1e6) for cost in (small, large)] == [15, 61]
    for name in ("README.md", "server/cli.py"):
        joined = re.sub(r'["\s]+', " ", (ROOT / name).read_text("utf-8"))
        assert "15 MB for Qwen3-0.6B at rank 32, 61 MB for Llama-3-8B" in joined


@pytest.mark.parametrize("value_bytes", [2, 4])
def test_the_estimate_is_what_the_slots_and_heads_take(
    value_bytes: int, bundles: TinyBundles, substrate: Substrate
) -> None:
    """Against what `ExpertSlots` and `EvidenceHead` allocate."""
    device, dtype = torch.device("cpu"), {2: torch.bfloat16, 4: torch.float32}[value_bytes]
    cost = SlotCost.estimate(
        substrate.config,
        substrate.sites,
        hidden_size=substrate.base_model.hidden_size,
        tensor_parallel_size=1,
        value_bytes=value_bytes,
        cache_bytes=5,
    )
    slots = ExpertSlots(max_domains=7)
    for name, site in substrate.sites.items():
        linear = SimpleNamespace(output_size_per_partition=site.out_features)
        slots.add_site(name, linear, substrate.lora_a[name], device, dtype)
    head = ForgetExpert.read(bundles.experts["domain-0"], substrate).evidence
    head_bytes = sum(p.nbytes for p in head.parameters())
    assert cost.head_bytes == head_bytes
    assert cost.total(7) == 5 + 7 * head_bytes + sum(
        site.lora_a.nbytes + site.lora_b.nbytes for site in slots.sites.values()
    )


def test_ranks_share_column_parallel_sites_and_hold_row_parallel_ones_whole() -> None:
    layer = {"qkv": (10, 24), "o": (12, 5), "gate_up": (10, 40), "down": (20, 5)}
    config = AlterConfig(tap_layer=1, rank=3, evidence_ngram=2, evidence_units=7)
    cost = cost_of(config, layer, hidden_size=10, num_layers=3, tensor_parallel_size=2)
    assert cost.outputs == 2 * (24 // 2 + 5 + 40 // 2 + 5)
    assert cost.lora_a_bytes == 2 * 3 * 2 * (10 + 12 // 2 + 10 + 20 // 2)
    assert cost.head_bytes == 4 * (7 * 20 + 7 + 7 + 1)


def test_the_largest_number_fits_and_one_more_does_not() -> None:
    cost = cost_of(
        AlterConfig(tap_layer=9), QWEN3_600M, hidden_size=1024, num_layers=28, cache_bytes=GIB
    )
    for room in (3 * GIB, 3 * GIB + 1, 20 * GIB):
        largest = cost.largest(room)
        assert cost.total(largest) <= room < cost.total(largest + 1)
    assert cost.largest(GIB) < 1


def test_default_slots_fit_beside_an_8b_model_on_24_gb() -> None:
    cost = cost_of(AlterConfig(tap_layer=10), LLAMA3_8B, hidden_size=4096, num_layers=32)
    room = Room(
        memory_bytes=24 * GIB,
        utilization=0.92,
        weights_bytes=16_060_522_496,
        kv_cache_bytes=None,
    )
    memory.check_slots(64, cost, room)
    assert 64 < cost.largest(room.for_slots) < 200


def test_the_refusal_has_the_arithmetic_and_the_number_that_fits() -> None:
    cost = cost_of(
        AlterConfig(tap_layer=9), QWEN3_600M, hidden_size=1024, num_layers=28, cache_bytes=GIB
    )
    room = Room(
        memory_bytes=8 * GIB, utilization=0.92, weights_bytes=2 * GIB, kv_cache_bytes=4 * GIB
    )
    with pytest.raises(ConfigError) as caught:
        memory.check_slots(98, cost, room)
    error = caught.value
    assert error.what.startswith("98 slots")
    assert error.got == (
        "2.52 GiB: 100 experts x rank 32 x 233,472 outputs x 2 bytes = 1.39 GiB, A 8.3 MiB, "
        "evidence heads 122.5 MiB, evidence cache 1.00 GiB"
    )
    assert error.expected == (
        "at most 2.00 GiB: 8.00 GiB less weights 2.00 GiB and KV cache 4.00 GiB"
    )
    fix = re.search(r"--alter-max-domains to (\d+) or less", str(error.fix))
    assert fix is not None
    memory.check_slots(int(fix[1]), cost, room)
    with pytest.raises(ConfigError):
        memory.check_slots(int(fix[1]) + 1, cost, room)


def test_room_is_a_share_of_memory_unless_the_cache_is_given() -> None:
    room = Room(memory_bytes=1000, utilization=0.5, weights_bytes=100, kv_cache_bytes=None)
    assert room.for_slots == 400
    assert dataclasses.replace(room, kv_cache_bytes=300).for_slots == 600


def test_where_the_model_alone_does_not_fit_no_number_is_named() -> None:
    cost = cost_of(AlterConfig(tap_layer=9), QWEN3_600M, hidden_size=1024, num_layers=28)
    room = Room(memory_bytes=GIB, utilization=0.9, weights_bytes=2 * GIB, kv_cache_bytes=None)
    with pytest.raises(ConfigError, match="Not even one slot fits") as caught:
        memory.check_slots(1, cost, room)
    assert "at most 0.0 MiB" in str(caught.value)


def test_weights_are_counted_in_the_served_dtype(tmp_path: Path) -> None:
    save_file(
        {
            "a": torch.zeros(3, 5),
            "b": torch.zeros(7, dtype=torch.bfloat16),
            "packed": torch.zeros(11, dtype=torch.uint8),
        },
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )

    def count(value_bytes: int, is_quantised_at_loading: bool = False) -> int:
        return memory.weight_bytes(
            tmp_path, value_bytes=value_bytes, is_quantised_at_loading=is_quantised_at_loading
        )

    assert count(2) == 2 * (15 + 7) + 11
    assert count(4) == 4 * (15 + 7) + 11
    assert count(2, is_quantised_at_loading=True) == (15 + 7) // 2 + 11


def test_only_files_that_the_index_names_are_counted(tmp_path: Path) -> None:
    for name in ("consolidated", "model-1"):
        save_file({"a": torch.zeros(6, dtype=torch.bfloat16)}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    assert memory.weight_bytes(tmp_path, value_bytes=2, is_quantised_at_loading=False) == 12


def test_weights_of_a_model_folder_are_its_parameters(bundles: TinyBundles) -> None:
    num_parameters = sum(p.numel() for p in load_model(bundles.model).parameters())
    for value_bytes in (2, 4):
        counted = memory.weight_bytes(
            bundles.model, value_bytes=value_bytes, is_quantised_at_loading=False
        )
        assert counted == num_parameters * value_bytes


def test_the_cpu_cache_is_the_variables_over_the_flags() -> None:
    assert memory.cpu_kv_cache_bytes(None, {}) is None
    assert memory.cpu_kv_cache_bytes(5, {"VLLM_CPU_KVCACHE_SPACE": ""}) == 5
    assert memory.cpu_kv_cache_bytes(5, {"VLLM_CPU_KVCACHE_SPACE": "2"}) == 2 * GIB
    with pytest.raises(ConfigError, match="VLLM_CPU_KVCACHE_SPACE"):
        memory.cpu_kv_cache_bytes(None, {"VLLM_CPU_KVCACHE_SPACE": "2.5"})


def test_host_memory_is_never_above_the_containers_limit(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  9 kB\nMemFree:  1 kB\nMemAvailable:  6 kB\nHugePages_Total: 0\n")
    assert memory.host_memory(None, meminfo) == (9 * 1024, 6 * 1024)
    assert memory.host_memory(7 * 1024, meminfo) == (7 * 1024, 6 * 1024)
    assert memory.host_memory(5 * 1024, meminfo) == (5 * 1024, 5 * 1024)
    total, available = memory.host_memory(None)
    assert 0 < available <= total


def serve(bundles: TinyBundles, max_domains: int, *flags: str) -> None:
    settings = ServeSettings(substrate=bundles.substrate, max_domains=max_domains)
    launch.serve(str(bundles.model), settings, flags)


@pytest.mark.parametrize("flags", [[], ["--kv-cache-memory-bytes", "1048576"]], ids=["auto", "kv"])
def test_serve_refuses_what_does_not_fit_and_starts_with_what_it_names(
    flags: list[str], bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(launch, "_run", started.append)
    with pytest.raises(ConfigError, match="do not fit") as caught:
        serve(bundles, 10_000_000, *flags)
    assert started == []
    fix = re.search(r"to ([\d,]+) or less", str(caught.value.fix))
    assert fix is not None
    # A few less: memory that is available changes from call to call.
    serve(bundles, int(int(fix[1].replace(",", "")) * 0.9), *flags)
    assert len(started) == 1


def test_serve_starts_with_the_default_slots(
    bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[object] = []
    monkeypatch.setattr(launch, "_run", started.append)
    launch.serve(str(bundles.model), ServeSettings(substrate=bundles.substrate), [])
    assert len(started) == 1


def test_more_ranks_leave_each_less_of_the_host(
    bundles: TinyBundles, substrate: Substrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda limit: (8 * GIB, 4 * GIB))

    def refusal(*flags: str) -> str:
        args = launch.parse_vllm_args(str(bundles.model), flags)
        with pytest.raises(ConfigError) as caught:
            launch.check_memory(args, 10_000_000, substrate)
        return f"{caught.value.expected}"

    assert "8.00 GiB x 0.92 less" in refusal()
    assert "4.00 GiB x 0.5 less" in refusal("-tp=2", "--gpu-memory-utilization", "0.5")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert "4.00 GiB less weights" in refusal()
    assert "KV cache 1.00 GiB" in refusal()


@pytest.mark.parametrize(
    ("dtype", "num_bytes"),
    [("auto", 2), ("bfloat16", 2), ("half", 2), ("float16", 2), ("float", 4), ("float32", 4)],
)
def test_every_dtype_is_served_where_the_platform_has_it(dtype: str, num_bytes: int) -> None:
    supported = [torch.bfloat16, torch.float16, torch.float32]
    assert launch.served_value_bytes(dtype, supported) == num_bytes


def test_a_dtype_that_the_platform_lacks_is_refused_with_one_that_it_has() -> None:
    supported = [torch.float16, torch.float32]
    with pytest.raises(ConfigError, match="cannot serve --dtype bfloat16") as caught:
        launch.served_value_bytes("bfloat16", supported)
    assert caught.value.fix == "Serve with --dtype float16, or without --dtype."
    assert launch.served_value_bytes("auto", supported) == 2


_WITHOUT_BF16 = """
import torch
for name in ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_amx_tile_supported"):
    setattr(torch.cpu, name, lambda: False)
from vllm.platforms import current_platform
current_platform.import_kernels()
assert "_C_AVX2" in open("/proc/self/maps").read()
assert torch.bfloat16 in current_platform.supported_dtypes
x = torch.randn(3, 128).to(torch.bfloat16)
y = torch.empty(3, 64, dtype=torch.bfloat16)
torch.ops._C.silu_and_mul(y, x)
gate, up = x.float().chunk(2, dim=1)
torch.testing.assert_close(y.float(), torch.nn.functional.silu(gate) * up, atol=0.02, rtol=0.02)
weight = torch.ones(128, dtype=torch.bfloat16)
z = torch.empty_like(x)
torch.ops._C.rms_norm(z, x, weight, 1e-6)
wanted = torch.nn.functional.rms_norm(x.float(), (128,), eps=1e-6)
torch.testing.assert_close(z.float(), wanted, atol=0.02, rtol=0.02)
print("computed")
"""


def _is_avx2() -> bool:
    return sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() in (
        "AVX2",
        "AVX512",
    )


@pytest.mark.skipif(not _is_avx2(), reason="not an x86 CPU with AVX2")
def test_vllm_computes_bf16_on_a_cpu_without_bf16_instructions() -> None:
    """vLLM's AVX2 kernels, which such a CPU gets, convert bf16 themselves: nothing is to be refused."""
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_BF16],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("computed")
