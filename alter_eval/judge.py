"""A judge of fluency: a language model behind any OpenAI-compatible endpoint."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from openai import APIStatusError, OpenAI, OpenAIError

from alter_core.errors import JudgeError

API_KEY_VARIABLE = "OPENAI_API_KEY"
"""Environment variable with the judge's API key, as OpenAI's own clients have it."""

PROMPT = """\
You rate the fluency of a text that a language model wrote in reply to an instruction.

Fluency is grammar, coherence and natural wording. Whether the text is true, complete or helpful does not \
count: a refusal, or a wrong statement, may be perfectly fluent.

1: no language: gibberish, endless repetition, or nothing at all
2: broken: most sentences are ungrammatical, cut off, or do not hang together
3: understandable, with several errors, repetitions or sudden turns
4: fluent, with a few slips
5: as fluent as a careful writer

Instruction:
{instruction}

Text:
{answer}

Reply with one digit from 1 to 5 and nothing else."""

_CONCURRENCY = 8
_PROBE = ("Say what the weather is like.", "It is sunny today, with a light wind from the west.")


class Judge:
    """Rates answers from 1 to 5 by PROMPT, at temperature 0."""

    def __init__(self, url: str, model: str) -> None:
        """`url` is the API's base, with `/v1` where it has one; the key is in OPENAI_API_KEY."""
        self._url, self._model = url, model
        key = os.environ.get(API_KEY_VARIABLE)
        # A local judge needs no key; the client insists on one.
        self._client = OpenAI(base_url=url, api_key=key or "unused", timeout=120)

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def check(self) -> None:
        """Raises: JudgeError if the judge does not rate a plain sentence."""
        if self._rate(*_PROBE) is None:
            raise self._error("a digit from 1 to 5", "a reply without one", "Choose another judge.")

    def rate(self, pairs: Sequence[tuple[str, str]]) -> list[int | None]:
        """Scores of (instruction, answer) pairs; None where the reply holds none. Raises: JudgeError."""
        with ThreadPoolExecutor(_CONCURRENCY) as executor:
            return list(executor.map(lambda pair: self._rate(*pair), pairs))

    def _rate(self, instruction: str, answer: str) -> int | None:
        # Replaced in one pass: an answer may hold braces.
        content = PROMPT.format(instruction=instruction, answer=answer)
        try:
            completion = self._client.chat.completions.create(
                model=self._model, messages=[{"role": "user", "content": content}], temperature=0
            )
        except OpenAIError as error:
            # The message of the error is left out: it may hold the prompt, or the key.
            status = f" {error.status_code}" if isinstance(error, APIStatusError) else ""
            raise self._error(
                f"an answer of {self._url}",
                f"{type(error).__name__}{status}",
                f"Check --judge-url, --judge-model and {API_KEY_VARIABLE}, and repeat the command.",
            ) from None
        reply = (completion.choices[0].message.content if completion.choices else None) or ""
        found = re.search(r"(?<![\d.])[1-5](?![\d.]*\d)", reply)
        return int(found[0]) if found else None

    def _error(self, expected: str, got: str, fix: str) -> JudgeError:
        return JudgeError("The judge gives no score", expected=expected, got=got, fix=fix)
