"""A comment never stands inside an event."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.sse import EventStream, epoch_comment

COMMENT = epoch_comment(3, 4)
STREAM = b"data: a\ndata: b\n\n: keep-alive\n\ndata: c\r\n\r\ndata: d\r\rdata: e\n\n"


def events(stream: bytes) -> list[bytes]:
    """An independent reading: normalise line ends, split at blank lines."""
    normal = stream.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return [event for event in normal.split(b"\n\n") if event]


def test_the_comment_names_both_epochs() -> None:
    assert COMMENT == b": alter-epoch 3 -> 4\n\n"


def test_whole_events_get_the_comment_before_them() -> None:
    stream = EventStream()
    assert stream.passed(b"data: a\n\n") == b"data: a\n\n"
    assert stream.insert(b"data: b\n\n", COMMENT) == (COMMENT + b"data: b\n\n", True)


def test_inside_an_event_it_waits_for_the_end() -> None:
    stream = EventStream()
    stream.passed(b"data: {")
    assert stream.insert(b"1, 2", COMMENT) == (b"1, 2", False)
    assert stream.insert(b"}\n", COMMENT) == (b"}\n", False)
    assert stream.insert(b"\ndata: b", COMMENT) == (b"\n" + COMMENT + b"data: b", True)


@given(
    cuts=st.lists(st.integers(0, len(STREAM)), max_size=8),
    switch=st.integers(0, 9),
)
def test_events_stay_what_they_were_under_any_chunking(cuts: list[int], switch: int) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    chunks = [STREAM[a:b] for a, b in itertools.pairwise(edges)]
    stream, sent, is_placed = EventStream(), b"", False
    for index, chunk in enumerate(chunks):
        if index >= switch and not is_placed and chunk:
            chunk, is_placed = stream.insert(chunk, COMMENT)
        else:
            stream.passed(chunk)
        sent += chunk
    assert sent.replace(COMMENT, b"", 1) == STREAM
    expected = events(STREAM)
    assert [e for e in events(sent) if e != COMMENT.strip()] == expected


@pytest.mark.parametrize("end", [b"\n\n", b"\r\r", b"\r\n\r\n", b"\n\r\n"])
def test_every_end_of_an_event_is_known(end: bytes) -> None:
    stream = EventStream()
    stream.passed(b"data: a")
    for byte in end[:-1]:
        assert not stream.insert(bytes([byte]), COMMENT)[1]
    assert stream.insert(end[-1:] + b"data: b", COMMENT)[1]
