"""Who may do what under /admin, and what wrong tokens lead to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.auth import MAX_FAILURES, FailureLimit, client_network
from server.tokens import TokenStore
from tests.support.tiny import TinyBundles

from .conftest import TOKEN, Stack
from .test_admin import URL, body, is_problem

Test = Callable[[Stack, httpx.AsyncClient], Awaitable[None]]


@pytest.fixture
def tokens(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path / "tokens.json")


@pytest.fixture
def with_tokens(make_stack: Callable[..., Any], tokens: TokenStore) -> Callable[..., None]:
    """Runs a coroutine function over a fresh stack that knows the tokens."""

    def run(test: Test, **options: Any) -> None:
        async def running() -> None:
            stack = await make_stack(tokens=tokens, **options)
            async with stack.client() as client:
                await test(stack, client)

        asyncio.run(running())

    return run


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_roles_of_a_request(with_tokens: Any, tokens: TokenStore, bundles: TinyBundles) -> None:
    viewer = bearer(tokens.create("v", "viewer"))
    changers = [bearer(tokens.create("o", "operator")), bearer(tokens.create("a", "admin"))]

    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        for headers in (*changers, bearer(TOKEN)):
            created = await client.post(URL, json=body(bundles, 0), headers=headers)
            assert created.status_code == 201
            assert (await client.get(f"{URL}/a", headers=viewer)).status_code == 200
            epoch = stack.service.epoch
            for method, path in (
                ("POST", URL),
                ("DELETE", f"{URL}/a"),
                ("PUT", URL),
                ("PATCH", f"{URL}/a"),
                ("POST", "/admin/nothing"),
            ):
                refused = await client.request(method, path, json={}, headers=viewer)
                assert is_problem(refused, 403, "role-too-low")["got"] == "the role viewer"
            assert stack.service.epoch == epoch
            assert (await client.delete(f"{URL}/a", headers=headers)).status_code == 200
        assert (await client.get("/admin/status", headers=viewer)).status_code == 200

    with_tokens(test)


def test_unknown_and_expired_tokens_are_answered_alike(
    with_tokens: Any, tokens: TokenStore
) -> None:
    expired = tokens.create("alice", "admin", lifetime=timedelta(0))
    revoked = tokens.create("bob", "admin")
    tokens.revoke("bob")

    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        answers = []
        for token in (expired, revoked, "wrong"):
            response = await client.get("/admin/status", headers=bearer(token))
            is_problem(response, 401, "unauthorized")
            assert response.headers["www-authenticate"].endswith('error="invalid_token"')
            answers.append((response.content, sorted(response.headers.items())))
        assert answers[0] == answers[1] == answers[2]
        assert b"alice" not in answers[0][0]

    with_tokens(test)


def test_a_tokens_file_alone_opens_the_admin_side(with_tokens: Any, tokens: TokenStore) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        is_problem(await client.get("/admin/status"), 401, "unauthorized")
        headers = bearer(tokens.create("alice", "viewer"))  # while the server runs
        assert (await client.get("/admin/status", headers=headers)).status_code == 200
        tokens.revoke("alice")
        is_problem(await client.get("/admin/status", headers=headers), 401, "unauthorized")

    with_tokens(test, token=None)


def test_too_many_wrong_tokens_have_to_wait(with_tokens: Any) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        for _ in range(MAX_FAILURES):
            is_problem(await client.get("/admin/status", headers=bearer("x")), 401, "unauthorized")
        for headers in (bearer("x"), bearer(TOKEN)):
            refused = await client.get("/admin/status", headers=headers)
            is_problem(refused, 429, "too-many-failures")
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        other = httpx.ASGITransport(app=stack.app, client=("192.0.2.7", 1))
        async with httpx.AsyncClient(transport=other, base_url="http://alter") as elsewhere:
            response = await elsewhere.get("/admin/status", headers=bearer(TOKEN))
            assert response.status_code == 200

    with_tokens(test)


def test_requests_without_a_token_and_of_too_low_a_role_do_not_count(
    with_tokens: Any, tokens: TokenStore
) -> None:
    viewer = bearer(tokens.create("v", "viewer"))

    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        for _ in range(2 * MAX_FAILURES):
            is_problem(await client.post(URL, json={}, headers=viewer), 403, "role-too-low")
            is_problem(await client.get(URL, headers={"Authorization": ""}), 401, "unauthorized")
        assert (await client.get(URL)).status_code == 200

    with_tokens(test)


def test_each_actor_has_idempotency_keys_of_its_own(
    with_tokens: Any, tokens: TokenStore, bundles: TinyBundles
) -> None:
    actors = [bearer(tokens.create(name, "operator")) for name in ("o1", "o2")]

    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        statuses = []
        for headers in actors:
            key = headers | {"Idempotency-Key": "k"}
            answer = await client.post(URL, json=body(bundles, 0), headers=key)
            assert "idempotency-replayed" not in answer.headers
            statuses.append(answer.status_code)
        assert statuses == [201, 200]

    with_tokens(test)


def test_the_limit_slides_and_is_bounded() -> None:
    time = [100.0]
    limit = FailureLimit(3, 10.0, max_addresses=2, now=lambda: time[0])
    for moment in (100.0, 104.0):
        time[0] = moment
        limit.record("a")
    assert limit.wait_s("a") == 0
    time[0] = 105.0
    limit.record("a")
    assert limit.wait_s("a") == 5
    assert limit.wait_s("b") == 0
    time[0] = 110.0
    assert limit.wait_s("a") == 0
    limit.record("a")
    assert limit.wait_s("a") == 4
    limit.record("b")
    limit.record("c")
    assert limit.wait_s("a") == 0
    assert len(limit._failures) == 2


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("testclient", "unknown"),
    ],
)
def test_what_counts_as_one_client(host: str, network: str) -> None:
    assert client_network({"client": (host, 1)}) == network
    assert client_network({"client": None}) == client_network({}) == "unknown"
