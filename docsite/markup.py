"""Markdown, written by programs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

_CODE = re.compile(r"(`+)(?:(?!\1).)+\1")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with a blank line around it; nothing if there are no rows. Cells are Markdown."""
    lines = [f"| {' | '.join(cell(text) for text in row)} |" for row in rows]
    if not lines:
        return ""
    head = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
    return "\n" + "\n".join([*head, *lines]) + "\n"


def cell(text: str) -> str:
    """Prose or Markdown on one line, with what would end the cell or begin a tag escaped outside of code."""
    text = " ".join(text.split())
    parts, end = [], 0
    for match in _CODE.finditer(text):
        parts += [_escaped(text[end : match.start()]), match[0]]
        end = match.end()
    return "".join([*parts, _escaped(text[end:])])


def code(value: object) -> str:
    """Inline code."""
    return f"`{value}`" if str(value) else ""


def fence(language: str, text: str) -> str:
    """A block of code with a blank line around it."""
    return f"\n```{language}\n{text}\n```\n"


def json_block(value: Any) -> str:
    """A block of JSON."""
    return fence("json", json.dumps(value, indent=2, ensure_ascii=False))


def sentence(text: str) -> str:
    """With a full stop."""
    text = text.strip()
    return text + ("." if text and not text.endswith((".", ":")) else "")


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
