from __future__ import annotations

import torch

from alter_core.rows import read_rows
from trainer.base_model import BaseModel
from trainer.dataset import encode_rows
from trainer.domains import cluster_rows, k_means

from .world import World


def test_clusters_that_stand_apart_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    truth = torch.arange(3).repeat_interleave(7)
    points = centres[truth] + torch.randn(21, 2, generator=generator)
    found = k_means(points, 3, seed=4)
    assert all(len(found[truth == cluster].unique()) == 1 for cluster in range(3))
    assert len(found.unique()) == 3


def test_rows_are_cut_the_same_way_by_the_same_seed(world: World, base: BaseModel) -> None:
    rows = encode_rows(
        read_rows([world.files["red"], world.files["general"]]), base.tokenizer, max_tokens=64
    )
    found = cluster_rows(base, rows, 2, tap_layer=1, seed=0)
    assert found == cluster_rows(base, rows, 2, tap_layer=1, seed=0)
    assert found == [0] * 8 + [1] * 8, "questions here, prose there"
