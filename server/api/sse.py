"""Where a comment may stand in an event stream: between events, never inside one."""

from __future__ import annotations

import re

_END_OF_EVENT = re.compile(rb"\n\n|\r\r|\r\n\r\n|\n\r\n")
_TAIL_BYTES = 3
"""An end of an event that is cut by chunks has at most this many bytes in the earlier ones."""


class EventStream:
    """Follows the chunks of one stream and places comments between its events."""

    def __init__(self) -> None:
        self._tail = b""
        self._is_between_events = True

    def insert(self, chunk: bytes, comment: bytes) -> tuple[bytes, bool]:
        """`chunk` with `comment` at the first place between events, and whether there was one.

        That is before the chunk if the last one ended an event, as chunks from vLLM do; otherwise
        behind the end of the event that the chunk goes on with; otherwise nowhere.
        """
        if self._is_between_events:
            self._follow(chunk)
            return comment + chunk, True
        tail = self._tail
        self._follow(chunk)
        end = _first_end(tail, chunk)
        if end is None:
            return chunk, False
        return chunk[:end] + comment + chunk[end:], True

    def passed(self, chunk: bytes) -> bytes:
        """Takes note of a chunk that is sent as it is."""
        self._follow(chunk)
        return chunk

    def _follow(self, chunk: bytes) -> None:
        if not chunk:
            return
        ends = list(_END_OF_EVENT.finditer(self._tail + chunk))
        self._is_between_events = bool(ends) and ends[-1].end() == len(self._tail + chunk)
        self._tail = (self._tail + chunk)[-_TAIL_BYTES:]


def epoch_comment(begun: int, now: int) -> bytes:
    """The comment of a stream that spans a switch."""
    return f": alter-epoch {begun} -> {now}\n\n".encode()


def _first_end(tail: bytes, chunk: bytes) -> int | None:
    for match in _END_OF_EVENT.finditer(tail + chunk):
        if match.end() > len(tail):
            return match.end() - len(tail)
    return None
