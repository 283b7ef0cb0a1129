"""What the delta must move and compute at least, beside what the base model moves anyway.

    python -m benchmarks.serving.floor        the tables of docs/performance.md

Over the adapted layers' sites, each with I features in and O out, for a step of T tokens on experts, d of
them different, of rank r and 2 bytes a number:

    bytes(A) = 2 r sum I            once a step
    bytes(B) = 2 r sum O            for each expert in use
    flops    = 2 r sum (I + O)      for each token on an expert
    base     = 2 P bytes a step and 2 P flops a token, P the parameters of all linears and the output head

x and y themselves (2 I and 2 O bytes a token and site) are left out: the base model has just moved them. So
are attention and its keys and values, which would make the shares smaller. The evidence heads, computed as
they stand, read 4 (G D H + 2 H + 1) bytes for each domain a step and take 2 H (G D + 1) flops for each domain
and new token (G n-gram, D hidden, H units).
"""

from __future__ import annotations

import dataclasses
import math

from alter_core import AlterConfig, default_tap_layer

from .models import SHAPES, Sizes
from .settings import RANK

_HEAD_BYTES = 4


def seven_billion() -> Sizes:
    """Llama-2-7B's."""
    return Sizes(hidden=4096, intermediate=11008, num_layers=32, qkv=3 * 4096, vocabulary=32000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Floor:
    """Bytes a step and flops a token, of one model and rank."""

    base_bytes: int
    base_flops: int
    a_bytes: int
    """All A, once a step."""
    b_bytes: int
    """All B of one expert."""
    flops: int
    """Of a token on an expert."""
    head_bytes: int
    """Evidence head of one domain."""
    head_flops: int
    """The same, of one new token."""

    def bytes_share(self, num_experts: int) -> float:
        """What a step that uses so many experts moves for them, over what the base model moves."""
        return (self.a_bytes + num_experts * self.b_bytes) / self.base_bytes

    @property
    def flops_share(self) -> float:
        """What a token on an expert costs more, over what it costs anyway."""
        return self.flops / self.base_flops

    def head_bytes_share(self, num_domains: int) -> float:
        """What a step reads of the evidence heads of so many domains, over what the base model moves."""
        return num_domains * self.head_bytes / self.base_bytes


def floor_of(sizes: Sizes, rank: int = RANK, *, value_bytes: int = 2) -> Floor:
    """The floor of a model whose upper two thirds are adapted at all four sites."""
    config = AlterConfig(rank=rank, tap_layer=default_tap_layer(sizes.num_layers))
    adapted = sizes.num_layers - config.tap_layer
    total_in = adapted * sum(size for size, _ in sizes.sites)
    total_out = adapted * sum(size for _, size in sizes.sites)
    parameters = sizes.linear_parameters
    units, features = config.evidence_units, config.evidence_ngram * sizes.hidden
    return Floor(
        base_bytes=value_bytes * parameters,
        base_flops=2 * parameters,
        a_bytes=value_bytes * rank * total_in,
        b_bytes=value_bytes * rank * total_out,
        flops=2 * rank * (total_in + total_out),
        head_bytes=_HEAD_BYTES * (features * units + 2 * units + 1),
        head_flops=2 * units * (features + 1),
    )


def rank_of_bundle(heavier: Sizes, sizes: Sizes) -> int:
    """The multiple of `RANK` at which an expert weighs what one of `RANK` weighs on a heavier model."""
    wanted, unit = floor_of(heavier), floor_of(sizes)
    return RANK * math.ceil((wanted.b_bytes + wanted.head_bytes - unit.head_bytes) / unit.b_bytes)


def table() -> str:
    """The floors of the benchmark's models and of a 7B, in Markdown."""
    models = {name: Sizes.of(shape) for name, shape in SHAPES.items()}
    models["7b"] = seven_billion()
    counts = (1, 8, 16, 64)
    columns = ["base, MB a step", "A, MB", "B of an expert, MB"]
    columns += [f"bytes of {count} experts over base" for count in counts]
    columns += ["flops over base", "evidence head, MB", "256 heads over base, bytes"]
    lines = [f"| rank {RANK} | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for name, sizes in models.items():
        floor = floor_of(sizes)
        cells = [f"{size / 1e6:.4g}" for size in (floor.base_bytes, floor.a_bytes, floor.b_bytes)]
        cells += [f"{floor.bytes_share(count):.2%}" for count in counts]
        cells += [f"{floor.flops_share:.2%}", f"{floor.head_bytes / 1e6:.3g}"]
        cells += [f"{floor.head_bytes_share(256):.0%}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
