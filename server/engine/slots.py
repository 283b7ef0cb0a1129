"""Preallocated memory for experts on one worker, and the sharding of their tensors.

Expert index 0 is the retain expert, 1..S are the domain slots, S + 1 is the canary's.

Legend: E experts, R rank, I input features, O stacked output features, both of this rank's shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from alter_core.errors import EngineError, UnsupportedModelError


def shard_lora_a(linear: nn.Module, lora_a_RI: Tensor) -> Tensor:
    """This rank's columns of A: all of them, unless the linear's input is split (row-parallel)."""
    if not isinstance(linear, RowParallelLinear):
        return lora_a_RI
    size = linear.input_size_per_partition
    return lora_a_RI[:, linear.tp_rank * size : (linear.tp_rank + 1) * size]


def shard_lora_b(linear: nn.Module, lora_b_OR: Tensor) -> Tensor:
    """This rank's rows of a stacked B: all of them for row-parallel, its heads or columns otherwise.

    Raises: UnsupportedModelError for a linear that is none of vLLM's parallel linears.
    """
    if isinstance(linear, RowParallelLinear):
        return lora_b_OR
    if isinstance(linear, QKVParallelLinear):
        kv_rank = linear.tp_rank // linear.num_kv_head_replicas
        segments = [
            (
                linear.total_num_heads * linear.head_size,
                linear.num_heads * linear.head_size,
                linear.tp_rank,
            ),
            (
                linear.total_num_kv_heads * linear.head_size,
                linear.num_kv_heads * linear.head_size,
                kv_rank,
            ),
            (
                linear.total_num_kv_heads * linear.v_head_size,
                linear.num_kv_heads * linear.v_head_size,
                kv_rank,
            ),
        ]
    elif isinstance(linear, MergedColumnParallelLinear | ColumnParallelLinear):
        sizes = getattr(linear, "output_sizes", None) or [linear.output_size]
        segments = [(size, size // linear.tp_size, linear.tp_rank) for size in sizes]
    else:
        raise UnsupportedModelError(
            "An adapted module is not one of vLLM's parallel linear layers",
            expected="QKV-, merged column-, column- or row-parallel linear",
            got=type(linear).__name__,
        )
    rows, start = [], 0
    for total, shard, rank in segments:
        rows.append(lora_b_OR[start + rank * shard : start + (rank + 1) * shard])
        start += total
    return torch.cat(rows)


@dataclasses.dataclass(kw_only=True)
class SiteSlots:
    """Tensors of one site on this rank: lora_a (R, I), lora_b (E, R, O); B is kept transposed."""

    name: str
    linear: nn.Module
    lora_a: Tensor
    lora_b: Tensor


class ExpertSlots:
    """All experts' B on this worker. Written only while generation is paused."""

    def __init__(self, *, max_domains: int) -> None:
        self.max_domains = max_domains
        self.num_experts = max_domains + 2
        self.canary = max_domains + 1
        self.sites: dict[str, SiteSlots] = {}

    def add_site(
        self, name: str, linear: Any, lora_a: Tensor, device: torch.device, dtype: torch.dtype
    ) -> SiteSlots:
        """Allocates one site. `lora_a` is the whole A; the shard is taken here."""
        shard = shard_lora_a(linear, lora_a).to(device=device, dtype=dtype).contiguous()
        is_row_parallel = isinstance(linear, RowParallelLinear)
        out_features = linear.output_size if is_row_parallel else linear.output_size_per_partition
        lora_b = torch.zeros(
            (self.num_experts, shard.shape[0], out_features), device=device, dtype=dtype
        )
        site = SiteSlots(name=name, linear=linear, lora_a=shard, lora_b=lora_b)
        self.sites[name] = site
        return site

    def shard_expert(self, lora_b: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One expert's B for this rank, ready to be copied. Shapes: (O_full, R) -> (R, O)."""
        sharded = {}
        for name, site in self.sites.items():
            target = site.lora_b[0]
            b_RO = shard_lora_b(site.linear, lora_b[name]).T.contiguous().to(target.dtype)
            if b_RO.shape != target.shape:
                raise EngineError(
                    f"B of {name!r} does not fit this rank",
                    expected=str(tuple(target.shape)),
                    got=str(tuple(b_RO.shape)),
                )
            sharded[name] = b_RO
        return sharded

    def write(self, expert: int, lora_b: Mapping[str, Tensor] | None) -> None:
        """Copies a sharded expert into place, or clears it (None), and reads it back.

        Raises: EngineError if memory does not hold what was written.
        """
        for name, site in self.sites.items():
            target = site.lora_b[expert]
            if lora_b is None:
                target.zero_()
            else:
                target.copy_(lora_b[name])
                if not torch.equal(target, lora_b[name].to(target.device)):
                    raise EngineError(f"slot {expert} of {name!r} does not hold what was written")

    def read(self, expert: int) -> dict[str, Tensor]:
        """A copy of one expert's B, to restore it later."""
        return {name: site.lora_b[expert].clone() for name, site in self.sites.items()}
