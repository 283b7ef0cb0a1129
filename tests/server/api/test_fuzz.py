"""schemathesis over the whole OpenAPI description of `/admin`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from benchmarks.admin_fuzz import fuzz_admin
from server.requests.settings import RequestSettings

from .conftest import TOKEN, Listening, Stack


@pytest.fixture
def listening(make_stack: Callable[..., Any], plan: Any) -> Iterator[Listening]:
    """One that takes unlearning requests, too."""

    async def build() -> Stack:
        stack: Stack = await make_stack(requests=RequestSettings())
        return stack

    with contextlib.closing(Listening(build)) as server:
        yield server
        server.run(server.stack.runtime.close())


def check(listening: Listening, max_examples: int) -> None:
    report = fuzz_admin(listening.url, TOKEN, random_seed=6, max_examples=max_examples)
    assert report.failures == []
    assert report.operations >= 7
    assert report.requests >= report.operations * max_examples


def test_no_request_breaks_the_admin_side_or_gets_in_without_a_token(listening: Listening) -> None:
    check(listening, 3)


@pytest.mark.slow
def test_many_more_requests_do_not_either(listening: Listening) -> None:
    check(listening, 100)
