"""Prompts as token ids, and answers as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from alter_core.rows import Row
from trainer.dataset import encode_rows

from .data import read_json_lines

_MAX_PROMPT_TOKENS = 2048


def chat_prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Texts as a user's turn, up to where the assistant begins.

    Raises: TrainingDataError naming the first prompt of more than 2,048 tokens.
    """
    # What is answered does not matter: the ids before it are kept.
    rows = [
        Row(file=Path("prompts"), line=number, turns=(("user", text), ("assistant", "-")))
        for number, text in enumerate(texts, start=1)
    ]
    encoded = encode_rows(rows, tokenizer, max_tokens=_MAX_PROMPT_TOKENS)
    return [list(row.ids[: row.num_prompt]) for row in encoded]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """A completion as text."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def read_instructions(path: Path, limit: int | None = None) -> list[str]:
    """The first `limit` of a file with one `{"instruction"}` a line, as RWKU's. Raises: EvaluationError."""
    rows = read_json_lines(path, ("instruction",), fix="Write JSON lines of `instruction`.")
    return [row["instruction"] for row in rows[:limit]]
