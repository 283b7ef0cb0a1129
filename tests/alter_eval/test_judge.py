from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from alter_core.errors import JudgeError
from alter_eval.judge import PROMPT, Judge

from .conftest import FakeServer, serve_fake


def reply(text: str | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "j", "choices": [choice]}


@contextlib.contextmanager
def judging(text: str | None) -> Iterator[tuple[Judge, FakeServer]]:
    def answer(path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        return reply(text) if path == "/v1/chat/completions" else None

    with (
        serve_fake(answer) as fake,
        contextlib.closing(Judge(f"{fake.url}/v1", "judge-1")) as judge,
    ):
        yield judge, fake


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("4", 4),
        (" 1\n", 1),
        ("Score: 3", 3),
        ("5.", 5),
        ("4/5", 4),
        ("**2**", 2),
        ("4.5", None),
        ("10", None),
        ("0", None),
        ("7", None),
        ("I cannot say", None),
        ("", None),
        (None, None),
    ],
)
def test_a_score_is_a_digit_from_1_to_5(text: str | None, score: int | None) -> None:
    with judging(text) as (judge, _):
        assert judge.rate([("Say it.", "It.")]) == [score]


def test_the_published_prompt_is_asked_with_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with judging("3") as (judge, fake):
        judge.rate([("Name {a} town.", "{Hull}"), ("Go on.", "")])
    (path, body, headers), *_ = sorted(
        fake.asked, key=lambda asked: asked[1]["messages"][0]["content"], reverse=True
    )
    assert path == "/v1/chat/completions"
    assert headers["authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    expected = PROMPT.replace("{instruction}", "Name {a} town.").replace("{answer}", "{Hull}")
    assert body["messages"] == [{"role": "user", "content": expected}]


@pytest.mark.parametrize("status", [401, 404])
def test_a_judge_that_refuses_is_an_error_that_tells_neither_key_nor_text(
    monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with judging("3") as (judge, fake):
        fake.status = status
        with pytest.raises(JudgeError, match=rf"{status}.*OPENAI_API_KEY") as caught:
            judge.rate([("Where was Zofia born?", "In Narvik.")])
    assert not [s for s in ("sk-secret", "Zofia", "Narvik") if s in str(caught.value)]


def test_a_judge_that_is_down_is_an_error() -> None:
    with (
        contextlib.closing(Judge("http://127.0.0.1:9/v1", "j")) as judge,
        pytest.raises(JudgeError, match=r"127\.0\.0\.1:9.*APIConnectionError.*--judge-url"),
    ):
        judge.check()


def test_a_judge_is_checked_on_a_plain_sentence() -> None:
    with judging("5") as (judge, fake):
        judge.check()
    assert len(fake.asked) == 1
    with judging("Splendid!") as (judge, _), pytest.raises(JudgeError, match="a reply without one"):
        judge.check()
