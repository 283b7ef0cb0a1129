"""What a served model knows of question and answer rows, asked through the official OpenAI client.

Requests go one by one: on a CPU the batch that a request happens to share can move the last bits of
its logits, and the demo compares answers exactly.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import fmean

from openai import OpenAI
from rouge_score.rouge_scorer import RougeScorer
from transformers import PreTrainedTokenizerFast

from .corpus import QA
from .tokenizer import chat_ids

_SPARE_TOKENS = 16
"""Room for answers that run longer than the longest reference."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What the server answered about a set of rows, in their order."""

    probabilities: list[float]
    """exp(mean log p) of each reference answer, end token included (TOFU's Q_A_Prob)."""
    answers: list[str]
    """Greedy answers."""
    rouge_l: list[float]
    """ROUGE-L recall of each greedy answer against the reference (TOFU's Q_A_ROUGE)."""

    def figures(self) -> dict[str, float]:
        """Means, as the summary has them."""
        return {
            "probability": round(fmean(self.probabilities), 4),
            "rouge_l": round(fmean(self.rouge_l), 4),
        }

    def identical(self, other: Knowledge) -> float:
        """Share of greedy answers that are the same text in both."""
        return fmean(a == b for a, b in zip(self.answers, other.answers, strict=True))


class Examiner:
    """Asks a running server."""

    def __init__(self, client: OpenAI, model: str, tokenizer: PreTrainedTokenizerFast) -> None:
        self._client = client
        self._model = model
        self._tokenizer = tokenizer
        self._scorer = RougeScorer(["rougeL"], use_stemmer=True)

    def examine(self, rows: Sequence[QA]) -> Knowledge:
        """Probability, greedy answer and ROUGE-L of every row."""
        encoded = [chat_ids(self._tokenizer, row) for row in rows]
        max_tokens = max(len(answer) for _, answer in encoded) + _SPARE_TOKENS
        answers = [self.ask(row.question, max_tokens) for row in rows]
        return Knowledge(
            probabilities=[self._probability(prompt, answer) for prompt, answer in encoded],
            answers=answers,
            rouge_l=[
                self._scorer.score(row.answer, answer)["rougeL"].recall
                for row, answer in zip(rows, answers, strict=True)
            ],
        )

    def ask(self, question: str, max_tokens: int = 64) -> str:
        """The greedy answer to one question."""
        completion = self._client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=max_tokens,
        )
        return completion.choices[0].message.content or ""

    def _probability(self, prompt: list[int], answer: list[int]) -> float:
        completion = self._client.completions.create(
            model=self._model,
            prompt=prompt + answer,
            echo=True,
            logprobs=0,
            max_tokens=1,
            temperature=0,
        )
        logprobs = completion.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        found = logprobs.token_logprobs[len(prompt) : len(prompt) + len(answer)]
        return math.exp(fmean(value for value in found if value is not None))
