from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.serving.operators import read_table


def test_table_of_torchs_profiler_is_read_in_its_order() -> None:
    a, b = torch.ones(30, 40), torch.ones(40, 50)
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        for _ in range(3):
            torch.relu(a @ b)
    text = recorded.key_averages().table(sort_by="self_cpu_time_total", row_limit=50)
    operators = {operator.name: operator for operator in read_table(text)}
    assert operators["aten::relu"].calls == operators["aten::mm"].calls == 3
    assert operators["aten::matmul"].total_share > operators["aten::matmul"].self_share
    shares = [operator.self_share for operator in operators.values()]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1.0, abs=0.02)
