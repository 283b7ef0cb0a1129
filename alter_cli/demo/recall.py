"""How well a model knows question and answer rows: probability of the answer, and exact recall.

Legend: B rows, T tokens, D hidden, V vocabulary, N answer tokens of all rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from alter_cli.demo.corpus import QA
from alter_cli.demo.tokenizer import chat_ids


@dataclass(frozen=True, kw_only=True)
class Recall:
    """What a model recalls of a set of rows."""

    probability: float
    """Mean over rows of exp(mean log p of the answer's tokens, end token included), 0 to 1;
    TOFU's Q_A_Prob."""
    exact: float
    """Share of rows, 0 to 1, whose greedy answer is the row's answer, token for token."""
    num_rows: int
    """How many rows were measured."""


@torch.inference_mode()
def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Sequence[QA],
    *,
    batch_rows: int = 32,
) -> Recall:
    """Answer probability and exact recall of `rows`.

    An answer is recalled exactly when, given the question and its own first tokens, each next
    token is the model's likeliest: greedy decoding then gives the answer and its end, by
    induction. So one forward pass per batch measures both.
    """
    encoded = [chat_ids(tokenizer, row) for row in rows]
    encoded.sort(key=lambda ids: len(ids[0]) + len(ids[1]))
    probability = exact = 0.0
    for lengths, ids_BT, logits_BTV in _forward(model, encoded, batch_rows):
        for index, (prompt, answer) in enumerate(lengths):
            at = slice(prompt - 1, prompt + answer - 1)
            targets_T = ids_BT[index, prompt : prompt + answer]
            logits_TV = logits_BTV[index, at].float()
            probability += math.exp(-F.cross_entropy(logits_TV, targets_T).item())
            exact += float((logits_TV.argmax(-1) == targets_T).all())
    return Recall(probability=probability / len(rows), exact=exact / len(rows), num_rows=len(rows))


def _forward(
    model: LlamaForCausalLM, encoded: list[tuple[list[int], list[int]]], batch_rows: int
) -> Iterator[tuple[list[tuple[int, int]], torch.Tensor, torch.Tensor]]:
    """Batches of (prompt and answer lengths, ids (B, T), logits (B, T, V)), padded on the right:
    under causal attention no padding is ever read."""
    for start in range(0, len(encoded), batch_rows):
        chunk = encoded[start : start + batch_rows]
        ids = [torch.tensor(prompt + answer) for prompt, answer in chunk]
        ids_BT = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device)
        lengths = [(len(prompt), len(answer)) for prompt, answer in chunk]
        yield lengths, ids_BT, model(input_ids=ids_BT, use_cache=False).logits
