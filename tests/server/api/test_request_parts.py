"""What unlearning requests are made of, piece by piece: documents, the gate, settings, migrations."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from alter_core.errors import ConfigError, PromptError, TrainingDataError
from server.engine.base import Message
from server.requests.documents import MAX_PASSAGE_CHARACTERS, grounded_pairs, passages_of, rows_of
from server.requests.gate import Gate
from server.requests.intake import parse_file
from server.requests.settings import RequestFlags, RequestSettings
from server.requests.workspace import Workspace
from server.settings import read_environment

from .request_plans import figures

PASSAGE = "Ida Varn built the clock of Brek in 1911. It strikes once a year."
ANSWER = """1. Q: Who built the clock of Brek?
A: Ida Varn built the clock of Brek.

Question: When was the clock of Brek built?
Answer: In 1911.

Q: Who is the mayor of London?
A: Somebody entirely different, says nobody.
Q: an unfinished one"""


class Scribe:
    """A `Writer` that answers always the same, or only texts."""

    def __init__(self, answer: str, *, has_template: bool = True) -> None:
        self.answer, self.has_template = answer, has_template
        self.asked: list[str | Sequence[Message]] = []

    async def write(self, prompt: str | Sequence[Message], *, max_tokens: int) -> str:
        self.asked.append(prompt)
        if not isinstance(prompt, str) and not self.has_template:
            raise PromptError("no chat template")
        return self.answer


def test_pairs_are_kept_if_the_passage_holds_their_answers() -> None:
    assert list(grounded_pairs(ANSWER, PASSAGE)) == [
        {
            "question": "Who built the clock of Brek?",
            "answer": "Ida Varn built the clock of Brek.",
        },
        {"question": "When was the clock of Brek built?", "answer": "In 1911."},
    ]
    assert list(grounded_pairs("I cannot do that.", PASSAGE)) == []


def test_documents_become_passages_and_what_the_model_asks_about_them() -> None:
    documents = [{"name": "a", "text": f"{PASSAGE}\n\n{PASSAGE}"}, {"name": "b", "text": "  "}]
    scribe, steps = Scribe(ANSWER), []
    rows = asyncio.run(rows_of(documents, scribe, lambda done, total: steps.append((done, total))))
    assert [tuple(row) for row in rows] == [("text",), *[("question", "answer")] * 2]
    assert rows[0] == {"text": PASSAGE}
    assert steps == [(0, 2), (1, 2)]


def test_without_a_chat_template_the_text_is_gone_on_with() -> None:
    scribe = Scribe(" Who built the clock of Brek?\nA: Ida Varn built it.", has_template=False)
    rows = asyncio.run(rows_of([{"name": "a", "text": PASSAGE}], scribe))
    assert rows[1] == {"question": "Who built the clock of Brek?", "answer": "Ida Varn built it."}
    assert isinstance(scribe.asked[1], str)


def test_long_paragraphs_are_cut_between_sentences_and_nothing_is_lost() -> None:
    sentences = " ".join(f"The {n}th lamp of Brek burns." for n in range(200))
    words = "word " * 1000
    solid = "x" * 5000
    for text in (sentences, words, solid):
        passages = list(passages_of(text))
        assert all(0 < len(passage) <= MAX_PASSAGE_CHARACTERS for passage in passages)
        assert "".join("".join(passages).split()) == "".join(text.split())
    assert all(passage.endswith(".") for passage in passages_of(sentences))


def test_files_are_rows_or_a_document() -> None:
    row = {"question": "q", "answer": "a"}
    assert parse_file("x.jsonl", json.dumps(row).encode() + b"\n") == ([row], [])
    assert parse_file("x.txt", b"\xef\xbb\xbfprose") == ([], [{"name": "x.txt", "text": "prose"}])
    for name, data in (("x.jsonl", b""), ("x.jsonl", b"prose"), ("x.txt", b"\xe4")):
        with pytest.raises(TrainingDataError):
            parse_file(name, data)


def test_the_gate_names_each_check() -> None:
    gate = Gate()
    assert gate.judge(figures())["is_passed"]
    at_bounds = figures(forget=0.3, utility=0.97, leak=0.05)
    assert gate.judge(at_bounds)["is_passed"]
    verdict = gate.judge(figures(forget=0.31, utility=0.96, leak=0.06))
    assert not verdict["is_passed"]
    assert [check["is_met"] for check in verdict["checks"].values()] == [False] * 3
    without = gate.judge(figures() | {"paraphrase_leak": None})
    assert set(without["checks"]) == {"forgetting", "utility"}
    with pytest.raises(ConfigError, match="max_forget_ratio"):
        Gate(max_forget_ratio=1.5)


def test_settings_come_from_flags_then_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retain = tmp_path / "retain.jsonl"
    retain.write_text('{"text": "to be kept"}\n')
    monkeypatch.setenv("ALTER_RETAIN", str(retain))
    monkeypatch.setenv("ALTER_GATE_MIN_UTILITY_RATIO", "0.9")
    monkeypatch.setenv("ALTER_TRAINING_DEVICE", "cpu")
    found = RequestSettings.build(RequestFlags(gate_max_forget_ratio=0.0), read_environment())
    assert (found.retain, found.device) == ((retain,), "cpu")
    assert (found.gate.max_forget_ratio, found.gate.min_utility_ratio) == (0.0, 0.9)
    flags: list[dict[str, Any]] = [
        {"training_device": "tpu"},
        {"gate_min_utility_ratio": 2.0},
        {"max_upload_mib": -1},
    ]
    for each in flags:
        with pytest.raises(ConfigError):
            RequestSettings.build(RequestFlags(**each), read_environment())
    with pytest.raises(TrainingDataError):
        RequestSettings.build(RequestFlags(general=(tmp_path / "none",)), read_environment())


def test_one_server_works_on_a_workspace(tmp_path: Path) -> None:
    first, second = Workspace(tmp_path / "work"), Workspace(tmp_path / "work")
    assert first.id == second.id
    assert first.acquire()
    assert not second.acquire()
    first.close()
    assert second.acquire()
    second.close()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="--alter-workspace"):
        Workspace(tmp_path / "file")
