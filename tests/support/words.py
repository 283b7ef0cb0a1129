"""Stands in for a tokenizer and a model that writes."""

from __future__ import annotations

from collections.abc import Sequence

from alter_core.errors import PromptError
from server.engine.base import Message, PromptToken


class Words:
    """`Prompts`: a word is a token, its id its length. `Writer`: repeats what was said last."""

    async def read(self, prompt: str | Sequence[Message]) -> tuple[PromptToken, ...]:
        """See `Prompts.read`."""
        if not isinstance(prompt, str):
            prompt = " ".join(f"<{each['role']}> {each['content']}" for each in prompt)
        if not prompt.split():
            raise PromptError("This prompt has no token", expected="1 or more", got="0")
        return tuple(PromptToken(len(word), word) for word in prompt.split())

    async def write(self, prompt: str | Sequence[Message], *, max_tokens: int) -> str:
        """See `Writer.write`."""
        return f"<{prompt if isinstance(prompt, str) else prompt[-1]['content']}>"
