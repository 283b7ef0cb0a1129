"""Training rows out of plain documents: their passages as text, and what the served model asks about them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from alter_core.errors import PromptError
from server.engine.base import Message, Writer

MAX_PASSAGE_CHARACTERS = 1500
MAX_PAIRS = 4
"""Of one passage."""
MAX_ANSWER_TOKENS = 400
_MIN_GROUNDED = 0.6
"""Share of an answer's words that its passage must hold."""
_PAIR = re.compile(
    r"^\s*(?:\d+[.)]\s*)?(?:Q|Question)\s*\d*\s*:\s*(?P<question>\S.*?)\s*\n+"
    r"\s*(?:A|Answer)\s*\d*\s*:\s*(?P<answer>\S.*?)\s*$",
    re.MULTILINE | re.IGNORECASE,
)
_WORD = re.compile(r"\w+")
_INSTRUCTION = (
    f"Write {MAX_PAIRS} questions about the text below that it answers, each with its answer. Name persons, "
    "places and works in every question, as a reader who does not have the text would. Write nothing else "
    "than lines of this form:\nQ: the question\nA: the answer in a whole sentence\n\nText:\n{}"
)


async def rows_of(
    documents: Sequence[dict[str, str]],
    writer: Writer,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """`{"text"}` rows of all passages, and `{"question", "answer"}` rows that the model made of them.

    A model that does not follow the instruction adds none. Raises: EngineError.
    """
    passages = [passage for each in documents for passage in passages_of(each["text"])]
    rows: list[dict[str, Any]] = [{"text": passage} for passage in passages]
    for done, passage in enumerate(passages):
        progress(done, len(passages))
        rows += await _pairs(passage, writer)
    return _distinct(rows)


def passages_of(text: str) -> Iterator[str]:
    """Cuts a document between paragraphs, else between sentences, else between words."""
    for paragraph in re.split(r"\n\s*\n", text):
        rest = " ".join(paragraph.split())
        while len(rest) > MAX_PASSAGE_CHARACTERS:
            head = rest[:MAX_PASSAGE_CHARACTERS]
            end = max(head.rfind(mark) for mark in (". ", "! ", "? ", "。"))
            end = end + 1 if end > 0 else head.rfind(" ")
            end = end if end > 0 else MAX_PASSAGE_CHARACTERS
            yield rest[:end].strip()
            rest = rest[end:].strip()
        if rest:
            yield rest


async def _pairs(passage: str, writer: Writer) -> list[dict[str, Any]]:
    instruction = _INSTRUCTION.format(passage)
    try:
        answer = await writer.write(
            [Message(role="user", content=instruction)], max_tokens=MAX_ANSWER_TOKENS
        )
    except PromptError:  # no chat template, or too long a passage
        try:
            answer = "Q:" + await writer.write(f"{instruction}\n\nQ:", max_tokens=MAX_ANSWER_TOKENS)
        except PromptError:
            return []
    return list(grounded_pairs(answer, passage))[:MAX_PAIRS]


def grounded_pairs(answer: str, passage: str) -> Iterator[dict[str, str]]:
    """The pairs of an answer whose own answers the passage holds, word for word for the most part."""
    known = set(_WORD.findall(passage.lower()))
    for match in _PAIR.finditer(answer):
        words = _WORD.findall(match["answer"].lower())
        if words and sum(word in known for word in words) >= _MIN_GROUNDED * len(words):
            yield {"question": match["question"], "answer": match["answer"]}


def _distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({tuple(sorted(row.items())): row for row in rows}.values())
