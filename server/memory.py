"""Whether the slots that were asked for fit into memory, worked out before any weight is loaded.

Every estimate errs on the side of starting. Left out: activations and what graphs hold, Python and CUDA
themselves, the copies that a switch keeps in host memory, and the KV cache where vLLM gives it whatever is
left. So a server that passes may still run out; one that is refused could not have run. Figures are of one
tensor-parallel rank unless they say otherwise, in bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alter_core.bundle import SiteInfo
from alter_core.config import AlterConfig
from alter_core.errors import ConfigError

_GIB = 1 << 30
_MIB = 1 << 20
_KV_CACHE_SPACE = "VLLM_CPU_KVCACHE_SPACE"
_NUM_FIXED_EXPERTS = 2
"""The retain expert and the canary's."""
_ROW_PARALLEL_KINDS = ("o", "down")
_FLOAT_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
"""Tensors that vLLM casts to the served dtype; the others are quantised, and stay as they are."""
_QUANTISED_FLOAT_BYTES = 0.5
"""The least that quantising at loading (`--quantization`) leaves of a number."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotCost:
    """What ALTER takes on one rank."""

    rank: int
    outputs: int
    """Output features of all sites: this rank's share of column-parallel ones, row-parallel ones whole."""
    value_bytes: int
    """Of one number in the served dtype."""
    lora_a_bytes: int
    head_bytes: int
    """One domain's evidence head, float32."""
    cache_bytes: int
    """Of the router's tables with all slots occupied; 0 on an accelerator."""

    @classmethod
    def estimate(
        cls,
        config: AlterConfig,
        sites: Mapping[str, SiteInfo],
        *,
        hidden_size: int,
        tensor_parallel_size: int,
        value_bytes: int,
        cache_bytes: int,
    ) -> SlotCost:
        """From a substrate's sizes. Leaves out key and value heads that ranks hold twice."""
        outputs = inputs = 0
        for name, site in sites.items():
            is_row_parallel = name.rpartition(".")[2] in _ROW_PARALLEL_KINDS
            outputs += site.out_features // (1 if is_row_parallel else tensor_parallel_size)
            inputs += site.in_features // (tensor_parallel_size if is_row_parallel else 1)
        features = config.evidence_ngram * hidden_size
        return cls(
            rank=config.rank,
            outputs=outputs,
            value_bytes=value_bytes,
            lora_a_bytes=config.rank * inputs * value_bytes,
            head_bytes=4 * (config.evidence_units * (features + 2) + 1),
            cache_bytes=cache_bytes,
        )

    @property
    def expert_bytes(self) -> int:
        """Every B of one expert."""
        return self.rank * self.outputs * self.value_bytes

    def total(self, max_domains: int) -> int:
        """With all slots occupied."""
        return self._fixed() + max_domains * (self.expert_bytes + self.head_bytes)

    def largest(self, room_bytes: int) -> int:
        """The most slots that fit into `room_bytes`; below 1 if none does."""
        return (room_bytes - self._fixed()) // (self.expert_bytes + self.head_bytes)

    def _fixed(self) -> int:
        return _NUM_FIXED_EXPERTS * self.expert_bytes + self.lora_a_bytes + self.cache_bytes

    def describe(self, max_domains: int) -> str:
        """The arithmetic of `total`, in words."""
        num_experts = max_domains + _NUM_FIXED_EXPERTS
        lora_b = f"{num_experts:,} experts x rank {self.rank} x {self.outputs:,} outputs"
        parts = [
            f"{lora_b} x {self.value_bytes} bytes = {in_words(num_experts * self.expert_bytes)}",
            f"A {in_words(self.lora_a_bytes)}",
            f"evidence heads {in_words(max_domains * self.head_bytes)}",
        ]
        if self.cache_bytes:
            parts.append(f"evidence cache {in_words(self.cache_bytes)}")
        return f"{in_words(self.total(max_domains))}: {', '.join(parts)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """The memory of one rank, and what of it is spoken for."""

    memory_bytes: int
    utilization: float
    """Fraction that vLLM may take, `--gpu-memory-utilization`; it has no say once the KV cache is given."""
    weights_bytes: int
    kv_cache_bytes: int | None
    """None: vLLM gives the cache what weights and slots leave."""

    @property
    def for_slots(self) -> int:
        """What slots may take at most; negative if the model alone does not fit."""
        if self.kv_cache_bytes is None:
            return int(self.memory_bytes * self.utilization) - self.weights_bytes
        return self.memory_bytes - self.weights_bytes - self.kv_cache_bytes

    def describe(self) -> str:
        """The arithmetic of `for_slots`, in words."""
        memory, weights = in_words(self.memory_bytes), in_words(self.weights_bytes)
        if self.kv_cache_bytes is None:
            rest = f"{memory} x {self.utilization} less weights {weights}, before any KV cache"
        else:
            rest = f"{memory} less weights {weights} and KV cache {in_words(self.kv_cache_bytes)}"
        return f"{in_words(max(0, self.for_slots))}: {rest}"


def check_slots(max_domains: int, cost: SlotCost, room: Room) -> None:
    """Raises: ConfigError, with the arithmetic and the most slots that fit, if memory cannot hold them."""
    if cost.total(max_domains) <= room.for_slots:
        return
    largest = cost.largest(room.for_slots)
    raise ConfigError(
        f"{max_domains:,} slots for forget experts do not fit into the memory of a device",
        expected=f"at most {room.describe()}",
        got=cost.describe(max_domains),
        fix=f"Set --alter-max-domains to {largest:,} or less."
        if largest >= 1
        else "Not even one slot fits: give the KV cache less, or serve with more memory or ranks.",
    )


def weight_bytes(model: Path, *, value_bytes: int, is_quantised_at_loading: bool) -> int:
    """What the weights of a model folder take once loaded, over all ranks.

    Reads the headers of the safetensors files, those that the index names if there is one, as vLLM does.
    """
    index = model / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        files = [model / name for name in sorted(names)]
    else:
        files = sorted(model.glob("*.safetensors"))
    loaded_bytes = _QUANTISED_FLOAT_BYTES if is_quantised_at_loading else value_bytes
    total = 0.0
    for file in files:
        for tensor in _header(file).values():
            start, stop = tensor["data_offsets"]
            stored_bytes = _FLOAT_BYTES.get(tensor["dtype"])
            total += (stop - start) * (loaded_bytes / stored_bytes if stored_bytes else 1)
    return int(total)


def _header(file: Path) -> dict[str, dict[str, Any]]:
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    header.pop("__metadata__", None)
    return dict(header)


def cpu_kv_cache_bytes(flag: int | None, environ: Mapping[str, str]) -> int | None:
    """The KV cache of each CPU rank: VLLM_CPU_KVCACHE_SPACE (GiB) over `--kv-cache-memory-bytes`, as in vLLM.

    Raises: ConfigError if the variable is not a whole number.
    """
    text = environ.get(_KV_CACHE_SPACE, "")
    if not text:
        return flag
    try:
        return int(text) * _GIB
    except ValueError as error:
        raise ConfigError(
            f"The environment variable {_KV_CACHE_SPACE} has a bad value",
            expected="a whole number of GiB",
            got=repr(text),
            fix=f"Correct {_KV_CACHE_SPACE}, or unset it.",
        ) from error


def host_memory(limit_bytes: int | None, meminfo: Path = Path("/proc/meminfo")) -> tuple[int, int]:
    """(total, available) memory of this machine, neither above a container's limit.

    What the container uses already is not taken off: most of it is page cache, which gives way.
    """
    rows = (line.split() for line in meminfo.read_text("utf-8").splitlines())
    kib = {row[0]: int(row[1]) for row in rows if len(row) > 1}
    total, available = kib["MemTotal:"] * 1024, kib["MemAvailable:"] * 1024
    if limit_bytes is None:
        return total, available
    return min(total, limit_bytes), min(available, limit_bytes)


def in_words(num_bytes: int) -> str:
    """GiB, or MiB below one of them."""
    if num_bytes >= _GIB:
        return f"{num_bytes / _GIB:,.2f} GiB"
    return f"{num_bytes / _MIB:.1f} MiB"
