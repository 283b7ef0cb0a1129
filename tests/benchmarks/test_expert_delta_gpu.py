from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.expert_delta_gpu import MAX_PER_TOKEN, Case, cases, main, num_sets, step_weights


def test_cases_are_the_sites_and_steps_that_can_occur() -> None:
    found = cases(8)
    assert {case.site for case in found} == {"qkv", "o", "gate_up", "down"}
    steps = {(case.num_tokens, case.num_used) for case in found}
    assert steps == {
        (1, 1),
        *((tokens, used) for tokens in (16, 64, 512, 2048) for used in (1, 8, 64)),
    }


@pytest.mark.parametrize("case", [c for c in cases(8) if c.site == "o"], ids=lambda c: c.name)
def test_a_step_uses_as_many_experts_as_its_case_says(case: Case) -> None:
    is_used = step_weights(case) != 0
    assert int(is_used.any(dim=0).sum()) == case.num_used
    assert set(is_used.sum(dim=1).tolist()) == {case.per_token}
    assert case.per_token <= MAX_PER_TOKEN


def test_bytes_are_those_of_what_the_delta_touches() -> None:
    case = Case(site="down", num_tokens=3, num_used=2, rank=8)
    x, y = torch.empty(3, 11008).bfloat16(), torch.empty(3, 4096).bfloat16()
    a, b = torch.empty(8, 11008).bfloat16(), torch.empty(2, 8, 4096).bfloat16()
    assert case.num_bytes == sum(t.nbytes for t in (x, y, y, a, b))


def test_sets_of_buffers_outgrow_a_cache_of_64_mib() -> None:
    for rank in (8, 64):
        for case in cases(rank):
            assert num_sets(case) * case.num_bytes > 64 * 2**20


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures where there is a GPU")
def test_without_a_gpu_it_says_so_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--out", str(tmp_path)]) == 1
    assert "not measured" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
