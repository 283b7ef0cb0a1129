"""Blocks of code in Markdown, and the shell commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[a-z]*)[^\n]*\n(?P<text>.*?)^ *```$", re.M | re.S
)
_PUNCTUATION = set("();<>|&")
SHELL = ("console", "sh", "bash")


class Block(NamedTuple):
    """One fenced block."""

    language: str
    text: str


def blocks(markdown: str) -> Iterator[Block]:
    """Every fenced block, without the indentation that it has in a list."""
    for match in _FENCE.finditer(markdown):
        indent = match["indent"]
        lines = [line.removeprefix(indent) for line in match["text"].splitlines()]
        yield Block(match["language"], "\n".join(lines))


def command_lines(block: Block) -> Iterator[str]:
    """What a reader would type: behind prompts in `console`, everything in `sh`."""
    lines = iter(block.text.splitlines())
    for line in lines:
        if block.language == "console" and not line.startswith("$ "):
            continue
        text = line.removeprefix("$ ")
        while text.endswith("\\") or _is_open(text):
            text = text.removesuffix("\\") + "\n" + next(lines)
        if text.strip():
            yield text


def simple_commands(line: str) -> Iterator[list[str]]:
    """The words of each command of a line, without redirections, assignments and substitutions around it."""
    command: list[str] = []
    words = iter(_split(line))
    for word in words:
        if set(word) <= _PUNCTUATION:
            if word[0] in "<>":
                next(words)
                continue
            yield from _without_assignments(command)
            command = []
        else:
            command.append(word)
    yield from _without_assignments(command)


def without_optional(words: list[str]) -> tuple[list[str], list[str]]:
    """The words outside of `[...]`, by which a synopsis marks what may be left out, and those inside."""
    outside: list[str] = []
    inside: list[str] = []
    is_inside = False
    for word in words:
        is_inside = is_inside or word.startswith("[")
        (inside if is_inside else outside).append(word.strip("[]"))
        is_inside = is_inside and not word.endswith("]")
    return outside, inside


def _without_assignments(command: list[str]) -> Iterator[list[str]]:
    while command and re.match(r"^[A-Za-z_]+=", command[0]):
        command = command[1:]
    if command and command[0] != "$":
        yield command


def _split(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def _is_open(text: str) -> bool:
    """Whether a quotation goes on in the next line."""
    try:
        _split(text)
    except ValueError:
        return True
    return False
