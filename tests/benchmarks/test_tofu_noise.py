from __future__ import annotations

import random

from alter_eval.tofu import RowLog, SetLog
from benchmarks.tofu.noise import spread_by_rows


def _log(num_rows: int) -> SetLog:
    drawn = random.Random(0)
    rows = [
        RowLog(
            nll=5.0,
            rouge_l=0.2,
            correct_nll=6.0,
            wrong_nll=[7.0],
            extraction_strength=drawn.random() / 10,
            exact_memorization=0.4,
            min_k=drawn.gauss(-11, 1),
            wrong_min_k=drawn.gauss(-12, 1),
            leaked_words=0,
            repetition_rate=0.0,
        )
        for _ in range(num_rows)
    ]
    return SetLog(dataset="d", tokenizer="t", distinct_2=0.5, rows=rows)


def test_the_noise_of_a_mean_falls_with_the_root_of_the_rows() -> None:
    few, many = (spread_by_rows(_log(size), seed=0) for size in (40, 640))
    for name, wide in few.items():
        narrow = many[name]
        assert wide is not None
        assert narrow is not None
        assert 2.5 < wide / narrow < 6, name


def test_rows_that_are_all_alike_have_no_noise() -> None:
    one = _log(1).rows[0]
    found = spread_by_rows(_log(1).model_copy(update={"rows": [one] * 20}), seed=0)
    assert found["privleak_sd"] == 0
    assert found["extraction_strength_sd"] is not None
    assert found["extraction_strength_sd"] < 1e-9
