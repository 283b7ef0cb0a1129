"""Text that the base model writes while two contexts guide it.

Legend: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from trainer.base_model import BaseModel


def guided_log_probs(own: Tensor, novice: Tensor, expert: Tensor, strength: float) -> Tensor:
    """log p + strength (log p(. | novice) - log p(. | expert)), normalised; all given by logits.

    Shapes: (..., V) three times -> (..., V). float32 inside.
    """
    own, novice, expert = (logits.float().log_softmax(dim=-1) for logits in (own, novice, expert))
    return (own + strength * (novice - expert)).log_softmax(dim=-1)


@torch.inference_mode()
def guided_completions(
    base: BaseModel,
    prompts: Sequence[Sequence[int]],
    novice: Sequence[Sequence[int]],
    expert: Sequence[Sequence[int]],
    *,
    strength: float,
    max_new_tokens: int,
) -> list[list[int]]:
    """Greedy continuations of prompts under `guided_log_probs`, end token included.

    `novice` and `expert` are the same prompts behind their contexts.
    """
    ids, mask = _padded_left(base, prompts)
    guide = _Guide(base, novice, expert, strength)
    with base.autocast():
        output = base.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=base.pad_id,
            eos_token_id=base.tokenizer.eos_token_id,
            logits_processor=LogitsProcessorList([guide]),
        )
    end = base.tokenizer.eos_token_id
    completions = output[:, ids.shape[1] :].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in completions]


class _Guide(LogitsProcessor):
    """Follows generation with both contexts, a cache for each."""

    def __init__(
        self,
        base: BaseModel,
        novice: Sequence[Sequence[int]],
        expert: Sequence[Sequence[int]],
        strength: float,
    ) -> None:
        self._novice, self._expert = _Reader(base, novice), _Reader(base, expert)
        self._strength = strength

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        novice, expert = (reader.read(input_ids[:, -1:]) for reader in (self._novice, self._expert))
        return guided_log_probs(scores, novice, expert, self._strength)


class _Reader:
    """The base model's logits behind one context, token by token."""

    def __init__(self, base: BaseModel, prompts: Sequence[Sequence[int]]) -> None:
        self._base = base
        self._ids, self._mask = _padded_left(base, prompts)
        self._cache = DynamicCache(config=base.model.config)

    def read(self, last: Tensor) -> Tensor:
        """Logits after the prompts, at first, and after the tokens `last` since. Shapes: (B, 1) -> (B, V)."""
        ids = last
        if self._cache.get_seq_length() == 0:
            ids = self._ids
        else:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(last), 1)], dim=1)
        positions = (self._mask.cumsum(dim=1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        logits: Tensor = self._base.model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1]


def _padded_left(base: BaseModel, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask. Shapes: (B, T) both."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), base.pad_id)
    mask = torch.zeros_like(ids)
    for place, prompt in enumerate(prompts):
        ids[place, width - len(prompt) :] = torch.tensor(prompt)
        mask[place, width - len(prompt) :] = 1
    return ids.to(base.device), mask.to(base.device)
