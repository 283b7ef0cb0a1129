"""A language model as evaluation sees it: in this process, or behind a running server.

Legend: T answer tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import httpx
import torch
from transformers import PreTrainedTokenizerBase

from alter_core.attach import AttachedModel
from alter_core.errors import EngineError
from trainer.base_model import BaseModel
from trainer.batches import IGNORED, by_length, make_batch
from trainer.dataset import EncodedRow
from trainer.evaluation import greedy_completions, sampled_completions
from trainer.losses import token_nll

API_KEY_VARIABLE = "ALTER_API_KEY"
"""Environment variable with the API key of the server that is evaluated; a flag would show in process lists.

Not OPENAI_API_KEY: that one is for another party, and this server may be anybody's."""
_BATCH_TOKENS = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerScores:
    """Teacher-forced scores of one answer, end token included. Shapes: (T,)."""

    logprobs: list[float]
    """log p of every answer token, nats."""
    is_argmax: list[bool]
    """Whether the token is the most likely one."""

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return -sum(self.logprobs) / len(self.logprobs)


class LanguageModel(Protocol):
    """What is evaluated."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base model's."""

    def score(self, rows: Sequence[EncodedRow]) -> list[AnswerScores]:
        """Scores of the rows' answers."""

    def complete(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """Greedy continuations, without what follows the end token."""

    def sample(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seed: int
    ) -> list[list[int]]:
        """Continuations drawn at temperature 1, without what follows the end token."""


class TransformersModel:
    """A base model in this process, with whatever is attached to it."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """See LanguageModel."""
        return self.base.tokenizer

    @torch.inference_mode()
    def score(self, rows: Sequence[EncodedRow]) -> list[AnswerScores]:
        """See LanguageModel."""
        scores: dict[int, AnswerScores] = {}
        for indices in by_length(rows, _BATCH_TOKENS):
            batch = make_batch(rows, indices, self.base.pad_id).to(self.base.device)
            logits = self.base.logits(batch)
            logprobs = -token_nll(logits, batch.labels).cpu()
            is_argmax = (logits.argmax(dim=-1) == batch.labels).cpu()
            is_answer = (batch.labels != IGNORED).cpu()
            for place, index in enumerate(indices):
                scores[index] = AnswerScores(
                    logprobs=logprobs[place][is_answer[place]].tolist(),
                    is_argmax=is_argmax[place][is_answer[place]].tolist(),
                )
        return [scores[index] for index in range(len(rows))]

    def complete(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """See LanguageModel."""
        return greedy_completions(self.base, prompts, max_new_tokens=max_new_tokens)

    def sample(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seed: int
    ) -> list[list[int]]:
        """See LanguageModel."""
        return sampled_completions(self.base, prompts, max_new_tokens=max_new_tokens, seed=seed)


class WithoutExperts(TransformersModel):
    """The base model under an attached one: the judge of its fluency."""

    def __init__(self, base: BaseModel, attached: AttachedModel | None) -> None:
        super().__init__(base)
        self._attached = attached

    def score(self, rows: Sequence[EncodedRow]) -> list[AnswerScores]:
        """See LanguageModel."""
        with self._attached.disabled() if self._attached else contextlib.nullcontext():
            return super().score(rows)


class ServedModel:
    """A model behind an OpenAI-compatible server that echoes prompts with log probabilities."""

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """`url` is the server's root, without `/v1`."""
        self.tokenizer = tokenizer
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(
            base_url=f"{url.rstrip('/')}/v1", headers=headers, timeout=300, transport=transport
        )
        self._model = model
        self._concurrency = concurrency

    def close(self) -> None:
        """Closes the connections."""
        self._http.close()

    def score(self, rows: Sequence[EncodedRow]) -> list[AnswerScores]:
        """See LanguageModel."""
        with ThreadPoolExecutor(self._concurrency) as executor:
            return list(executor.map(self._score, rows))

    def complete(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int) -> list[list[int]]:
        """See LanguageModel."""

        options = {"max_tokens": max_new_tokens, "temperature": 0}
        with ThreadPoolExecutor(self._concurrency) as executor:
            return list(executor.map(lambda ids: self._complete(ids, **options), prompts))

    def sample(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, seed: int
    ) -> list[list[int]]:
        """See LanguageModel. The server's own default of how to sample is overruled."""
        options = {"max_tokens": max_new_tokens, "temperature": 1, "top_p": 1, "top_k": -1}

        def draw(index: int) -> list[int]:
            # A seed of its own for each, or a prompt asked five times has one answer.
            return self._complete(prompts[index], seed=seed + index, **options)

        with ThreadPoolExecutor(self._concurrency) as executor:
            return list(executor.map(draw, range(len(prompts))))

    def _complete(self, prompt: Sequence[int], **options: Any) -> list[int]:
        ids: list[int] | None = self._post(prompt, return_token_ids=True, **options).get(
            "token_ids"
        )
        if ids is None:
            raise _unusable("choices[0].token_ids", "none")
        end = self.tokenizer.eos_token_id
        return ids[: ids.index(end)] if end in ids else ids

    def _score(self, row: EncodedRow) -> AnswerScores:
        options = {"max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        logprobs = self._post(row.ids, **options).get("logprobs") or {}
        found = list(
            zip(logprobs.get("token_logprobs", ()), logprobs.get("top_logprobs", ()), strict=False)
        )
        if len(found) < len(row.ids):
            raise _unusable(f"log probabilities of {len(row.ids)} tokens", f"{len(found)}")
        # Nothing predicts the first token, and what comes after the row was generated.
        scored = zip(found[1:], row.is_answer[1:], strict=False)
        chosen = [pair for pair, answer in scored if answer]
        return AnswerScores(
            logprobs=[value for value, _ in chosen],
            is_argmax=[value >= max(top.values()) for value, top in chosen],
        )

    def _post(self, prompt: Sequence[int], **options: Any) -> dict[str, Any]:
        body = {"model": self._model, "prompt": list(prompt), **options}
        try:
            response = self._http.post("/completions", json=body)
        except httpx.HTTPError as error:
            raise EngineError(
                "The server cannot be asked",
                expected=f"an answer of {self._http.base_url}",
                got=f"{type(error).__name__}: {error}",
                fix="Check --server, and repeat the command: it goes on where it stopped.",
            ) from None
        if response.status_code != httpx.codes.OK:
            is_refused = response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)
            raise EngineError(
                "The server did not answer a question of the evaluation",
                expected="200",
                got=f"{response.status_code} {response.text[:200]}",
                fix=(
                    f"Put the server's API key into {API_KEY_VARIABLE}, and repeat the command."
                    if is_refused
                    else "Check --served-model and the server's --max-model-len, and repeat the command."
                ),
            )
        try:
            choice: dict[str, Any] = response.json()["choices"][0]
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise _unusable("choices[0]", type(error).__name__) from None
        return choice


def _unusable(expected: str, got: str) -> EngineError:
    return EngineError(
        "The server's answer cannot be used",
        expected=expected,
        got=got,
        fix="Ask a vLLM server: it echoes prompts with log probabilities and returns token ids.",
    )
