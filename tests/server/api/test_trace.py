"""`POST /admin/trace`: what is shown of a text's routes, and to whom."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

from alter_core.errors import PromptError
from server import cli
from server.audit import AuditLog
from server.client import AdminClient
from server.engine.base import EngineState
from server.tokens import TokenStore
from tests.support.tiny import TinyBundles

from .conftest import MAX_DOMAINS, TOKEN, Listening, Stack

URL = "/admin/trace"


@pytest.fixture
def over_http(make_stack: Callable[..., Any]) -> Callable[..., None]:
    """Runs a coroutine function over a fresh stack and a client into it."""

    def run(test: Callable[[Stack, httpx.AsyncClient], Awaitable[None]], **options: Any) -> None:
        async def running() -> None:
            stack = await make_stack(**options)
            async with stack.client() as client:
                await test(stack, client)

        asyncio.run(running())

    return run


def test_every_token_is_shown_with_its_path_and_its_experts_by_name(
    over_http: Any, bundles: TinyBundles
) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        await stack.activate("authors", bundles.experts["domain-0"])
        answer = await client.post(URL, json={"text": "crimson dusk"})
        assert answer.status_code == 200
        assert answer.headers["etag"] == '"1"'
        experts = [{"expert": "retain", "weight": 0.5}, {"expert": "authors", "weight": 0.5}]
        assert answer.json() == {
            "epoch": 1,
            "tokens": [
                {
                    "token_id": 7,
                    "text": "crimson",
                    "entropy": 0.7,
                    "path": "high",
                    "experts": experts,
                },
                {"token_id": 4, "text": "dusk", "entropy": 0.4, "path": "low", "experts": experts},
            ],
        }
        chat = {"messages": [{"role": "user", "content": "who"}]}
        answer = await client.post(URL, json=chat)
        assert [token["text"] for token in answer.json()["tokens"]] == ["<user>", "who"]

    over_http(test)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": "a", "messages": [{"role": "user", "content": "a"}]},
        {"text": ""},
        {"text": 7},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"text": "a", "temperature": 0},
        {"text": " "},
    ],
)
def test_what_is_no_prompt_is_refused_without_its_text(over_http: Any, body: Any) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        answer = await client.post(URL, json=body)
        assert answer.status_code == 422
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["detail"]

    over_http(test)


def test_the_text_is_neither_logged_nor_recorded(
    over_http: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = AuditLog.open(tmp_path / "audit.sqlite")

    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        before = log.head()
        for body in ({"text": "secret"}, {"text": "secret", "more": "secret"}):
            refused = await client.post(URL, json=body)
        assert "secret" not in refused.text
        assert log.head() == before
        assert "secret" not in caplog.text

    with caplog.at_level(logging.DEBUG, logger="server"):
        over_http(test, audit_log=log)


def test_a_server_that_may_not_generate_traces_nothing(over_http: Any) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        stack.expire_lease()
        answer = await client.post(URL, json={"text": "a"})
        assert answer.status_code == 503
        assert answer.json()["type"].endswith(":not-serving")
        assert answer.headers["retry-after"]

    over_http(test)


def test_a_trace_that_a_switch_came_after_is_taken_again(
    over_http: Any, bundles: TinyBundles
) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        await stack.activate("authors", bundles.experts["domain-0"])
        stack.engine.traced = [EngineState(epoch=0, digests=(None,) * MAX_DOMAINS)]
        answer = await client.post(URL, json={"text": "a"})
        assert answer.json()["epoch"] == 1
        assert stack.engine.traced == []

    over_http(test)


def test_a_viewer_may_not_make_the_engine_work(over_http: Any, tmp_path: Path) -> None:
    tokens = TokenStore(tmp_path / "tokens.json")
    viewer = tokens.create("eve", "viewer")

    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        headers = {"Authorization": f"Bearer {viewer}"}
        assert (await client.post(URL, json={"text": "a"}, headers=headers)).status_code == 403
        without = await client.post(URL, json={"text": "a"}, headers={"Authorization": ""})
        assert without.status_code == 401

    over_http(test, tokens=tokens)


def test_from_the_client_and_the_command_line(
    listening: Listening, bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    with AdminClient(listening.url, TOKEN) as client:
        client.activate("authors", str(bundles.experts["domain-0"]))
        traced = client.trace([{"role": "user", "content": "who wrote it"}])
        assert [token.text for token in traced.tokens] == ["<user>", "who", "wrote", "it"]
        with pytest.raises(PromptError):
            client.trace(" ")
    monkeypatch.setenv("ALTER_URL", listening.url)
    monkeypatch.setenv("ALTER_ADMIN_TOKEN", TOKEN)
    app = typer.Typer()
    app.command("trace")(cli.trace_command)
    shown = CliRunner().invoke(app, ["crimson dusk"])
    assert shown.exit_code == 0, shown.output
    assert "retain 0.50, authors 0.50" in shown.stdout
    as_json = CliRunner().invoke(app, ["-", "--chat", "--json"], input="who")
    assert [t["text"] for t in json.loads(as_json.stdout)["tokens"]] == ["<user>", "who"]
