"""`POST /admin/answers`: what is answered now, beside what the base model would answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from alter_cli.demo.tokenizer import train_tokenizer
from server import base_answers
from server.audit import AuditLog
from server.base_answers import BaseAnswers
from server.engine.base import Message, PromptToken
from server.tokens import TokenStore
from tests.support.tiny import VOCAB_SIZE, TinyBundles, load_model

from .conftest import Stack

URL = "/admin/answers"
SECRET = "Quillfeather"
IDS = (5, 17, 8)


class Fixed:
    """Reads and writes as told."""

    def __init__(self) -> None:
        self.before_it_ends: Callable[[], None] = lambda: None

    async def read(self, prompt: str | Sequence[Message]) -> tuple[PromptToken, ...]:
        return tuple(PromptToken(token_id, "x") for token_id in IDS)

    async def write(self, prompt: str | Sequence[Message], *, max_tokens: int) -> str:
        self.before_it_ends()
        return f"{max_tokens} tokens"


@pytest.fixture
def asked(make_stack: Callable[..., Any]) -> Callable[..., None]:
    """Runs a coroutine function over a fresh stack that can write, and a client into it."""

    def run(
        test: Callable[[Stack, httpx.AsyncClient, Fixed], Awaitable[None]],
        *,
        base: BaseAnswers | None = None,
        **options: Any,
    ) -> None:
        async def running() -> None:
            stack, fixed = await make_stack(**options), Fixed()
            runtime = stack.runtime
            runtime.prompts, runtime.writer, runtime.base_answers = fixed, fixed, base
            async with stack.client() as client:
                await test(stack, client, fixed)

        asyncio.run(running())

    return run


def test_only_the_answer_of_the_server_is_shown_by_default(
    asked: Any, bundles: TinyBundles
) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient, fixed: Fixed) -> None:
        await stack.activate("authors", bundles.experts["domain-0"])
        answer = await client.post(URL, json={"text": SECRET, "max_tokens": 7})
        assert answer.json() == {"epoch": 1, "current": "7 tokens", "base": None}
        for body in ({}, {"text": "a", "max_tokens": 0}, {"text": "a", "max_tokens": 9999}):
            refused = await client.post(URL, json=body)
            assert refused.status_code == 422
            assert SECRET not in refused.text

    asked(test)


def test_nothing_is_shown_without_leave_to_generate(asked: Any) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient, fixed: Fixed) -> None:
        fixed.before_it_ends = stack.expire_lease
        assert (await client.post(URL, json={"text": "a"})).status_code == 503
        assert (await client.post(URL, json={"text": "a"})).status_code == 503

    asked(test)


def test_the_base_model_answers_in_a_process_of_its_own_and_that_is_recorded(
    asked: Any, bundles: TinyBundles, tmp_path: Path
) -> None:
    log = AuditLog.open(tmp_path / "audit.sqlite")
    tokenizer = train_tokenizer([f"{SECRET} blows glass"] * 20, vocab_size=VOCAB_SIZE)
    tokenizer.save_pretrained(bundles.model)
    with torch.inference_mode():
        found = load_model(bundles.model).generate(
            torch.tensor([IDS]), do_sample=False, max_new_tokens=4
        )
    expected = tokenizer.decode(found[0, len(IDS) :], skip_special_tokens=True)

    async def test(stack: Stack, client: httpx.AsyncClient, fixed: Fixed) -> None:
        answer = await client.post(URL, json={"text": SECRET, "max_tokens": 4})
        assert answer.json() == {"epoch": 0, "current": "4 tokens", "base": expected}
        records = [record for record in log.records() if record.action != "start"]
        assert [(r.actor, r.action, r.outcome) for r in records] == [
            ("admin", "base-answer", "begun"),
            ("admin", "base-answer", "done"),
        ]
        assert SECRET not in str(records)

    asked(test, base=BaseAnswers(bundles.model), audit_log=log)


def test_a_base_model_that_does_not_answer_is_a_problem(
    asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = AuditLog.open(tmp_path / "audit.sqlite")

    monkeypatch.setattr(base_answers, "MODULE", "tests.nowhere")

    async def test(stack: Stack, client: httpx.AsyncClient, fixed: Fixed) -> None:
        lost = await client.post(URL, json={"text": SECRET})
        assert (lost.status_code, lost.json()["got"]) == (503, "exit status 1")
        monkeypatch.setattr(base_answers, "TIMEOUT_S", 0.01)
        late = await client.post(URL, json={"text": SECRET})
        assert (late.status_code, late.json()["got"]) == (503, "none within 0 s")
        outcomes = [r.outcome for r in log.records() if r.action == "base-answer"]
        assert outcomes == 2 * ["begun", "failed"]

    asked(test, base=BaseAnswers(tmp_path / "nowhere"), audit_log=log)


def test_a_viewer_is_shown_no_answer(asked: Any, tmp_path: Path) -> None:
    tokens = TokenStore(tmp_path / "tokens.json")
    headers = {"Authorization": f"Bearer {tokens.create('v', 'viewer')}"}

    async def test(stack: Stack, client: httpx.AsyncClient, fixed: Fixed) -> None:
        refused = await client.post(URL, json={"text": "a"}, headers=headers)
        assert refused.status_code == 403

    asked(test, tokens=tokens)
