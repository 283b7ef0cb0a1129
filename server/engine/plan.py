"""A step's routes on a CPU, as the one tensor that every linear reads; `csrc/routes.h` says the same.

Legend: T tokens, E experts, K experts that a token may combine, P routed (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def plan_size(num_tokens: int, top_k: int) -> int:
    """Numbers in a plan: P, then experts, tokens and weights of as many pairs as there can be."""
    return 1 + 3 * num_tokens * (1 + top_k)


def pack(weights_TE: Tensor, top_k: int) -> Tensor:
    """Pairs with a weight, sorted by expert. Shapes: (T, E) -> (1 + 3 T K,) int32, K = 1 + top_k."""
    experts, tokens = weights_TE.T.nonzero(as_tuple=True)
    plan = torch.zeros(plan_size(len(weights_TE), top_k), dtype=torch.int32)
    capacity, size = len(plan) // 3, len(experts)
    plan[0] = size
    plan[1 : 1 + size] = experts
    plan[1 + capacity : 1 + capacity + size] = tokens
    weights = weights_TE[tokens, experts].float()
    plan[1 + 2 * capacity : 1 + 2 * capacity + size] = weights.view(torch.int32)
    return plan


def unpack(plan: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert in use with its tokens (M,) and their weights (M,)."""
    capacity, size = len(plan) // 3, int(plan[0])
    experts = plan[1 : 1 + size]
    tokens = plan[1 + capacity : 1 + capacity + size].long()
    weights = plan[1 + 2 * capacity : 1 + 2 * capacity + size].view(torch.float32)
    in_use, counts = torch.unique_consecutive(experts, return_counts=True)
    sizes = counts.tolist()
    yield from zip(
        in_use.tolist(), torch.split(tokens, sizes), torch.split(weights, sizes), strict=True
    )


def dense(plan: Tensor, *, num_tokens: int, num_experts: int) -> Tensor:
    """The weights that were packed. Shapes: -> (T, E) float32."""
    weights_TE = torch.zeros(num_tokens, num_experts)
    for expert, tokens, weights in unpack(plan):
        weights_TE[tokens, expert] = weights
    return weights_TE
