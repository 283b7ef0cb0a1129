"""`Prefer: wait=N`, as RFC 7240 has it."""

from __future__ import annotations

import pytest

from server.api.preferences import wait_of


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], None),
        (["wait=10"], 10),
        (["respond-async, wait=10"], 10),
        (["respond-async", "wait=10"], 10),
        (["Wait = 7 ; x=y"], 7),
        (['wait="8"'], 8),
        (["wait=3, wait=5"], 3),
        (["wait=0"], 0),
        (["wait=99999"], 60),
        (["wait=-1"], None),
        (["wait=1.5"], None),
        (["wait"], None),
        (["await=4"], None),
        (["wait=" + "9" * 50], None),
    ],
)
def test_what_is_understood(headers: list[str], expected: int | None) -> None:
    assert wait_of(headers) == expected
