from __future__ import annotations

import statistics
from pathlib import Path

import pytest

from alter_core.errors import EvaluationError
from benchmarks.serving.trace import (
    FIRST_REQUEST,
    TRACE_FILE,
    Arrival,
    arrivals_of,
    at_rate,
    poisson_arrivals,
    scaled_lengths,
)


def _write_trace(data_dir: Path, num_rows: int) -> None:
    path = data_dir / TRACE_FILE
    path.parent.mkdir(parents=True)
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    for row in range(num_rows):
        minutes, seconds = divmod(row, 60)
        lines.append(f"2023-11-16 18:{minutes:02}:{seconds:02}.2500000,{row},{row // 2}")
    path.write_text("\n".join(lines) + "\n")


def test_trace_is_read_from_behind_its_lull_with_times_from_the_first_request(
    tmp_path: Path,
) -> None:
    _write_trace(tmp_path, FIRST_REQUEST + 5)
    arrivals, source = arrivals_of(tmp_path, 3, seed=0)
    assert source == "the Azure conversation trace's"
    assert arrivals == [
        Arrival(at_s=row, prompt_tokens=FIRST_REQUEST + row, answer_tokens=500 + row // 2)
        for row in range(3)
    ]


def test_trace_that_is_too_short_is_refused(tmp_path: Path) -> None:
    _write_trace(tmp_path, FIRST_REQUEST + 2)
    with pytest.raises(EvaluationError, match="does not hold enough requests"):
        arrivals_of(tmp_path, 3, seed=0)


def test_without_the_trace_arrivals_are_drawn_and_said_to_be(tmp_path: Path) -> None:
    arrivals, source = arrivals_of(tmp_path, 4, seed=7)
    assert "Poisson" in source
    assert arrivals == poisson_arrivals(4, seed=7)


def test_drawn_arrivals_have_the_rate_and_the_lengths_of_the_trace() -> None:
    arrivals = poisson_arrivals(4000, seed=0)
    assert len(arrivals) / arrivals[-1].at_s == pytest.approx(5.53, rel=0.05)
    assert statistics.median(a.prompt_tokens for a in arrivals) == pytest.approx(760, rel=0.1)
    assert statistics.median(a.answer_tokens for a in arrivals) == pytest.approx(151, rel=0.1)


def test_stretching_to_a_rate_keeps_the_shape_of_the_bursts() -> None:
    arrivals = [Arrival(at_s=at, prompt_tokens=1, answer_tokens=1) for at in (2.0, 2.5, 6.0, 7.0)]
    slower = at_rate(arrivals, 0.3)
    assert [a.at_s for a in slower] == pytest.approx([0.0, 1.0, 8.0, 10.0])


def test_lengths_are_divided_and_kept_within_their_ranges() -> None:
    lengths = [(40, 8), (4000, 4000), (1, 1)]
    arrivals = [Arrival(at_s=0.0, prompt_tokens=p, answer_tokens=a) for p, a in lengths]
    scaled = scaled_lengths(
        arrivals, divisor=4, prompt_tokens=range(3, 101), answer_tokens=range(2, 51)
    )
    assert [(a.prompt_tokens, a.answer_tokens) for a in scaled] == [(10, 2), (100, 50), (3, 2)]
