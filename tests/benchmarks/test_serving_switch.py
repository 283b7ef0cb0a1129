from __future__ import annotations

import pytest

from alter_core.errors import EngineError
from benchmarks.serving.gaps import Change, Stream, gap_beyond_step_s
from server.api.models import Switch


def _change(started: float, ended: float) -> Change:
    switch = Switch(
        epoch=1, stage_s=0, pause_s=0, kept_requests=0, recomputed_requests=0, recomputed_tokens=0
    )
    return Change(is_activation=True, started=started, ended=ended, switch=switch)


STREAMS = [
    Stream(3, 10.0, [0.1, 0.1, 0.5, 0.1]),  # tokens at 10.0, 10.1, 10.2, 10.7, 10.8
    Stream(5, 10.05, [0.1, 0.7, 0.1]),  # 10.05, 10.15, 10.85, 10.95
    Stream(7, 12.0, [0.9, 0.1]),
]


def test_gap_is_the_longest_of_all_streams_that_the_change_lies_in() -> None:
    found = gap_beyond_step_s(STREAMS, (10.25, 10.5), step_s=0.1)
    assert found == pytest.approx(0.6)


def test_gap_that_ends_after_the_answer_counts_too() -> None:
    assert list(STREAMS[0].gaps_across((10.3, 10.31))) == [0.5]
    assert list(STREAMS[0].gaps_across((9.0, 9.9))) == []


def test_change_that_no_stream_saw_is_refused() -> None:
    with pytest.raises(EngineError, match="No stream ran"):
        gap_beyond_step_s(STREAMS, (11.2, 11.5), step_s=0.1)


def test_a_change_is_held_against_as_long_a_time_before_it() -> None:
    change = _change(10.25, 10.5)
    assert change.span == (10.25, 10.5)
    assert change.span_before == (10.0, 10.25)


def test_tokens_in_flight_are_those_that_came_and_the_prompts_of_what_runs() -> None:
    assert [stream.tokens_at(10.25) for stream in STREAMS] == [3 + 3, 5 + 2, 0]
    assert STREAMS[0].tokens_at(10.8) == 0
