"""Guided generation with caches, against a loop that reads everything anew for every token."""

from __future__ import annotations

import torch

from trainer.base_model import BaseModel
from trainer.methods.guidance import guided_completions

PROMPTS = [[20, 31, 42], [55, 66, 77, 88, 99], [101]]
NOVICE = [[7, 8, *PROMPTS[0]], PROMPTS[1], [9, 10, 11, 12, *PROMPTS[2]]]
EXPERT = [[13, *PROMPTS[0]], [14, 15, 16, *PROMPTS[1]], [17, 18, *PROMPTS[2]]]


def _log_probs(base: BaseModel, ids: list[int]) -> torch.Tensor:
    return base.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(dim=-1)


@torch.inference_mode()
def _plain(base: BaseModel, place: int, strength: float, max_new_tokens: int) -> list[int]:
    found: list[int] = []
    while len(found) < max_new_tokens and found[-1:] != [base.tokenizer.eos_token_id]:
        own, novice, expert = (
            _log_probs(base, [*rows[place], *found]) for rows in (PROMPTS, NOVICE, EXPERT)
        )
        found.append(int((own + strength * (novice - expert)).argmax()))
    return found


def test_guided_completions_equal_a_loop_without_caches(base: BaseModel) -> None:
    for strength in (0.5, 2.0):
        found = guided_completions(
            base, PROMPTS, NOVICE, EXPERT, strength=strength, max_new_tokens=9
        )
        assert found == [_plain(base, place, strength, 9) for place in range(3)]


def test_guidance_changes_what_is_written(base: BaseModel) -> None:
    weak, strong = (
        guided_completions(base, PROMPTS, NOVICE, EXPERT, strength=strength, max_new_tokens=9)
        for strength in (0.01, 3.0)
    )
    assert weak != strong
