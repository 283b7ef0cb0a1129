"""The Triton delta on a GPU beside a copy of the bytes that it must move: `make bench-expert-delta-gpu`.

    python -m benchmarks.expert_delta_gpu [--rank 8] [--out docs/results]

For each adapted site of a 7B, one step of T tokens on N different experts in bf16: the two kernels, the plan
(once a step, not once a site), the reference over all slots, and a copy that moves as many bytes. What must
be moved is x, A, the experts in use, and y twice. Each figure is the median over replays of a captured graph
that goes through sets of buffers, together larger than the L2 cache: cold, as the model's own weights leave
them between two sites. Without a CUDA device: exit status 1, nothing written.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from alter_core.delta import multi_expert_delta

from .results import write_results
from .serving.floor import seven_billion
from .serving.settings import RANK

TOKENS = (1, 16, 64, 512, 2048)
EXPERTS_IN_USE = (1, 8, 64)
NUM_SLOTS = 66
"""`--alter-max-domains` of 64, the retain expert and the canary."""
MAX_PER_TOKEN = 4
"""Retain and top-3: more experts than that for each token do not occur."""
SITES = dict(zip(("qkv", "o", "gate_up", "down"), seven_billion().sites, strict=True))

_COLD_BYTES = 128 * 2**20
"""What the sets of buffers move together: more than an L2 cache holds."""
_MEMORY_BYTES = 8 * 2**30
"""What they may occupy together, unused slots included."""
_ROUNDS = 25
_SCALING = 2.0
_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One site and step."""

    site: str
    num_tokens: int
    num_used: int
    """Different experts in the step."""
    rank: int

    @property
    def name(self) -> str:
        return f"{self.site}_r{self.rank}_t{self.num_tokens}_n{self.num_used}"

    @property
    def sizes(self) -> tuple[int, int]:
        """(features in, features out)."""
        return SITES[self.site]

    @property
    def per_token(self) -> int:
        """Experts that each token needs so that all of them are in use."""
        return math.ceil(self.num_used / self.num_tokens)

    @property
    def num_bytes(self) -> int:
        """What the delta must move: x, A, the experts in use, y read and written; 2 bytes a number."""
        size_in, size_out = self.sizes
        x_and_y = self.num_tokens * (size_in + 2 * size_out)
        return 2 * (x_and_y + self.rank * (size_in + self.num_used * size_out))


def cases(rank: int) -> list[Case]:
    """Every site, T and N that can occur together."""
    every = itertools.product(SITES, TOKENS, EXPERTS_IN_USE)
    found = [Case(site=s, num_tokens=t, num_used=n, rank=rank) for s, t, n in every]
    return [case for case in found if case.per_token <= MAX_PER_TOKEN]


def step_weights(case: Case) -> Tensor:
    """Expert weights of a step that uses exactly `num_used` experts, in turn. Shape: (T, E)."""
    weights = torch.zeros(case.num_tokens, NUM_SLOTS)
    for token in range(case.num_tokens):
        for place in range(case.per_token):
            weights[token, 1 + (token * case.per_token + place) % case.num_used] = 1.0
    return weights


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and writes `expert-delta-gpu`. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rank", type=int, default=RANK)
    parser.add_argument("--quick", action="store_true", help="one site, written to build/")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("not measured: the kernels need a CUDA device and there is none", file=sys.stderr)
        return 1
    torch.manual_seed(_SEED)
    figures: dict[str, float | None] = {}
    rows = []
    for case in cases(options.rank):
        if options.quick and case.site != "qkv":
            continue
        measured = _measure(case)
        rows.append(_row(case, measured))
        print(rows[-1], flush=True)
        figures |= {f"{case.name}_{key}": value for key, value in measured.items()}
    path = write_results(
        options.out or Path("build/results" if options.quick else "docs/results"),
        "expert-delta-gpu",
        title="The experts' delta on a GPU",
        figures=figures,
        seed=_SEED,
        notes={
            "model": f"sites of a 7B, bf16, {NUM_SLOTS} slots",
            "us": "microseconds of one site, median of captured graphs over cold buffers",
            "copy": "a copy that moves as many bytes as the delta must",
            "share": "copy over delta: 1 is the measured bandwidth",
            "reference": "torch over all slots, whichever are in use",
        },
        table="\n".join([_HEADER, "|---" * _HEADER.count(" | ") + "|---|", *rows]),
    )
    print(path)
    return 0


_HEADER = (
    "| site | rank | tokens | experts | delta, us | plan, us | copy, us | share | reference, us |"
)


def _row(case: Case, measured: dict[str, float]) -> str:
    values = [measured[key] for key in ("delta_us", "plan_us", "copy_us")]
    columns = [case.site, case.rank, case.num_tokens, case.num_used]
    columns += [f"{value:.1f}" for value in values]
    columns += [f"{measured['share']:.2f}", f"{measured['reference_us']:.1f}"]
    return "| " + " | ".join(map(str, columns)) + " |"


def _measure(case: Case) -> dict[str, float]:
    """Times of one case."""
    from server.engine import triton_delta

    weights = step_weights(case).cuda()
    routes = triton_delta.plan(weights)
    sites = [_buffers(case) for _ in range(num_sets(case))]
    half = case.num_bytes // 2
    copies = [(torch.empty(half, dtype=torch.uint8, device="cuda"), _filled(half)) for _ in sites]

    def delta(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
        triton_delta.add_expert_delta(y, x, routes, lora_a, lora_b, _SCALING)

    def reference(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor) -> None:
        y += multi_expert_delta(x, lora_a, lora_b.transpose(1, 2), weights, _SCALING)

    delta_us = _time_us([lambda b=b: delta(*b) for b in sites])
    copy_us = _time_us([lambda c=c: c[0].copy_(c[1]) for c in copies])
    return {
        "delta_us": delta_us,
        "plan_us": _time_us([lambda: triton_delta.plan(weights)] * 8),
        "copy_us": copy_us,
        "share": copy_us / delta_us,
        "reference_us": _time_us([lambda b=b: reference(*b) for b in sites]),
    }


def num_sets(case: Case) -> int:
    """Sets of buffers to go through: cold if they fit, and at least two."""
    slots = 2 * NUM_SLOTS * case.rank * case.sizes[1]
    wanted = math.ceil(_COLD_BYTES / case.num_bytes)
    return max(2, min(wanted, _MEMORY_BYTES // (case.num_bytes + slots)))


def _buffers(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (T, O), x (T, I), A (R, I), B (E, R, O)."""
    size_in, size_out = case.sizes
    shapes = (
        (case.num_tokens, size_out),
        (case.num_tokens, size_in),
        (case.rank, size_in),
        (NUM_SLOTS, case.rank, size_out),
    )
    y, x, lora_a, lora_b = (
        torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes
    )
    return y, x, lora_a / size_in**0.5, lora_b / case.rank**0.5


def _filled(num_bytes: int) -> Tensor:
    return torch.ones(num_bytes, dtype=torch.uint8, device="cuda")


def _time_us(calls: list[Callable[[], object]]) -> float:
    """Microseconds of one call, median over replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(_ROUNDS + 3):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return statistics.median(times[3:])


if __name__ == "__main__":
    sys.exit(main())
