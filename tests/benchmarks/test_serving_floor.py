from __future__ import annotations

import pytest

from benchmarks.serving.floor import floor_of, rank_of_bundle, seven_billion, table
from benchmarks.serving.models import SHAPES, Sizes


def test_floor_of_a_small_model_is_that_of_its_matrices_counted_one_by_one() -> None:
    sizes = Sizes(hidden=6, intermediate=10, num_layers=3, qkv=8, vocabulary=20)
    floor = floor_of(sizes, rank=2)
    sites = [(6, 8), (6, 6), (6, 20), (10, 6)]
    adapted = 2  # of 3 layers, the upper two
    elements_a = sum(2 * size_in for size_in, _ in sites) * adapted
    elements_b = sum(2 * size_out for _, size_out in sites) * adapted
    weights = 3 * sum(a * b for a, b in sites) + 6 * 20
    assert (floor.a_bytes, floor.b_bytes) == (2 * elements_a, 2 * elements_b)
    assert floor.flops == 2 * (elements_a + elements_b)
    assert (floor.base_bytes, floor.base_flops) == (2 * weights, 2 * weights)
    assert floor.head_bytes == 4 * (5 * 6 * 64 + 64 + 64 + 1)


def test_floor_of_a_7b_at_rank_8() -> None:
    floor = floor_of(seven_billion())
    assert floor.b_bytes == 22 * 8 * (12288 + 4096 + 2 * 11008 + 4096) * 2
    assert floor.bytes_share(1) == pytest.approx(0.0018, abs=1e-4)
    assert floor.flops_share == pytest.approx(0.0018, abs=1e-4)


@pytest.mark.parametrize("name", list(SHAPES))
def test_rank_of_a_heavy_bundle_is_the_least_multiple_of_eight(name: str) -> None:
    sizes, wanted = Sizes.of(SHAPES[name]), floor_of(seven_billion())
    rank = rank_of_bundle(seven_billion(), sizes)

    def weight(rank: int) -> int:
        floor = floor_of(sizes, rank)
        return floor.b_bytes + floor.head_bytes

    assert rank % 8 == 0
    assert weight(rank - 8) < wanted.b_bytes + wanted.head_bytes <= weight(rank)


def test_table_has_a_line_a_model() -> None:
    assert [line.split(" | ")[0] for line in table().splitlines()[2:]] == [
        "| 25m",
        "| 150m",
        "| 7b",
    ]
