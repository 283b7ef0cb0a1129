"""General text for the demo: English that belongs to no author.

Offline there is one body of real English that every Python installation carries, and that is
Python's own: the language reference in `pydoc_data.topics` (what `help("if")` shows), and the
docstrings of the standard library's modules. Both are cut into paragraphs and freed of headings,
reStructuredText markup, grammar and code; about 0.6 MB stay. The order is fixed, so the same
Python gives the same text. Docstrings are read from the source files, without importing them.
"""

from __future__ import annotations

import ast
import re
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

MIN_CHARS = 80
MAX_CHARS = 900
MIN_LETTERS = 0.7
"""Least share of letters and spaces: prose has about 0.95, code and tables less."""

_UNDERLINE = re.compile(r"[*=\-~^\"]{3,}")
_BULLET = re.compile(r"(\*|-|\d+\.)\s+")
_ROLE = re.compile(r":[a-z:]+:`([^`]+)`")


@cache
def python_prose() -> tuple[str, ...]:
    """Paragraphs of the language reference and of the library's docstrings, each once."""
    found: dict[str, None] = {}
    for text in (*topics.values(), *_docstrings()):
        for block in re.split(r"\n\s*\n", text):
            paragraph = _paragraph(block)
            if paragraph is not None:
                found[paragraph] = None
    return tuple(found)


def _docstrings() -> Iterator[str]:
    """Docstrings of the library's single-file modules, their classes and functions, by name."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in sorted(sys.stdlib_module_names):
        source = library / f"{name}.py"
        if name.startswith("_") or not source.is_file():
            continue
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                yield ast.get_docstring(node) or ""


def _paragraph(block: str) -> str | None:
    """One block as prose; None where it is a heading, grammar, code or a fragment."""
    lines = block.split("\n")
    if "::=" in block or ">>>" in block:
        return None
    if any(_UNDERLINE.fullmatch(line.strip()) for line in lines):
        return None
    if lines[0].startswith("   "):  # an indented block without a bullet is code or a table
        return None
    text = _BULLET.sub("", block.strip(), count=1)
    text = re.sub(r"(\w)-\n\s*", r"\1-", text)  # a word divided at its hyphen
    text = _ROLE.sub(r"\1", text).replace("*", "").replace("``", "")
    text = re.sub(r"\s+", " ", text)
    letters = sum(char.isalpha() or char == " " for char in text)
    is_prose = MIN_CHARS <= len(text) <= MAX_CHARS and letters >= MIN_LETTERS * len(text)
    return text if is_prose else None
