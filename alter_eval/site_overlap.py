"""How far forget experts change the same sites in the same directions; from their weights alone.

Legend: N experts, O stacked output features, R rank.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy.linalg import orth  # type: ignore[import-untyped]

from alter_core.substrate import ForgetExpert, Substrate

from .metrics import Values


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteOverlap:
    """How far experts change the same sites in the same directions. Shapes: (N, N), symmetric.

    Means over sites. A site that an expert leaves alone overlaps with nothing.
    """

    cosine: Values
    """<B_i A, B_j A> over the Frobenius norms of both: 1 the same change, -1 the opposite one."""
    subspace: Values
    """Mean squared cosine of the principal angles between the column spaces of B_i and B_j (Björck and
    Golub 1973): 1 the same output directions, 0 orthogonal ones."""
    chance: float
    """`subspace` of random B: R / O."""


def site_overlap(substrate: Substrate, experts: Sequence[ForgetExpert]) -> SiteOverlap:
    """See SiteOverlap. A is shared, so <B_i A, B_j A> = <B_i (A A^T), B_j>."""
    cosines, subspaces = [], []
    for site in substrate.sites:
        lora_a = substrate.lora_a[site].double().cpu().numpy()
        lora_b_NOR = np.stack([expert.lora_b[site].double().cpu().numpy() for expert in experts])
        changed_NX = (lora_b_NOR @ (lora_a @ lora_a.T)).reshape(len(experts), -1)
        inner_NN = changed_NX @ lora_b_NOR.reshape(len(experts), -1).T
        norm_N = np.sqrt(np.diag(inner_NN))
        scale_NN = np.outer(norm_N, norm_N)
        cosines.append(
            np.divide(inner_NN, scale_NN, out=np.zeros_like(inner_NN), where=scale_NN > 0)
        )
        subspaces.append(_subspace_overlap([orth(lora_b) for lora_b in lora_b_NOR]))
    chances = [
        min(1, substrate.config.rank / info.out_features) for info in substrate.sites.values()
    ]
    return SiteOverlap(
        cosine=np.mean(cosines, axis=0),
        subspace=np.mean(subspaces, axis=0),
        chance=float(np.mean(chances)),
    )


def _subspace_overlap(bases: Sequence[Values]) -> Values:
    """||Q_i^T Q_j||^2 over the smaller rank: the singular values are the principal angles' cosines."""
    overlap = np.zeros((len(bases), len(bases)))
    for i, one in enumerate(bases):
        for j, other in enumerate(bases):
            num_angles = min(one.shape[1], other.shape[1])
            if num_angles:
                overlap[i, j] = np.square(one.T @ other).sum() / num_angles
    return overlap
