"""Cutting unlabelled forget data into domains: k-means on mean-pooled hidden states at the tap layer.

Legend: N rows, D hidden, K domains.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base_model import BaseModel
from .dataset import EncodedRow
from .entropy_pass import run_entropy_pass

_RESTARTS = 10
_ITERATIONS = 50


def cluster_rows(
    base: BaseModel, rows: Sequence[EncodedRow], num_domains: int, *, tap_layer: int, seed: int
) -> list[int]:
    """Domain of every row, 0 to num_domains - 1, numbered by first appearance."""
    pooled = pooled_states(base, rows, tap_layer=tap_layer)
    return _by_first_appearance(k_means(pooled, num_domains, seed=seed).tolist())


def pooled_states(base: BaseModel, rows: Sequence[EncodedRow], *, tap_layer: int) -> Tensor:
    """Mean of every row's hidden states at the tap layer's input, centred over the rows, of length 1.

    Shapes: -> (N, D) float32.
    """
    passed = run_entropy_pass(base, rows, tsallis_q=1.0, tap_layer=tap_layer)
    lengths = [len(row.ids) for row in rows]
    pooled = torch.stack([h.float().mean(dim=0) for h in passed.hidden_states.split(lengths)])
    return torch.nn.functional.normalize(pooled - pooled.mean(dim=0), dim=-1)


def k_means(points_ND: Tensor, num_clusters: int, *, seed: int) -> Tensor:
    """Cluster of every point, the best of several seeded starts (k-means++). Shapes: (N, D) -> (N,)."""
    generator = torch.Generator().manual_seed(seed)
    best, best_cost = None, float("inf")
    for _ in range(_RESTARTS):
        centres_KD = _spread_centres(points_ND, num_clusters, generator)
        for _ in range(_ITERATIONS):
            nearest_N = torch.cdist(points_ND, centres_KD).argmin(dim=1)
            moved_KD = centres_KD.clone()
            for cluster in nearest_N.unique().tolist():
                moved_KD[cluster] = points_ND[nearest_N == cluster].mean(dim=0)
            if torch.equal(moved_KD, centres_KD):
                break
            centres_KD = moved_KD
        distances_NK = torch.cdist(points_ND, centres_KD)
        cost = distances_NK.amin(dim=1).pow(2).sum().item()
        if cost < best_cost:
            best, best_cost = distances_NK.argmin(dim=1), cost
    assert best is not None
    return best


def _spread_centres(points_ND: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """k-means++: each further centre is drawn by its squared distance to those before."""
    chosen = [int(torch.randint(len(points_ND), (1,), generator=generator))]
    for _ in range(num_clusters - 1):
        squared = torch.cdist(points_ND, points_ND[chosen]).amin(dim=1).pow(2)
        chosen.append(int(torch.multinomial(squared + 1e-12, 1, generator=generator)))
    return points_ND[chosen].clone()


def _by_first_appearance(clusters: Sequence[int]) -> list[int]:
    numbers: dict[int, int] = {}
    return [numbers.setdefault(cluster, len(numbers)) for cluster in clusters]
