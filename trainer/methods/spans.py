"""Where the knowledge is in an answer, by comparison with answers that differ from it in the facts alone.

TOFU's perturbed answers repeat the form of the paraphrased answer and exchange what it tells.

Legend: T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from trainer.dataset import EncodedRow

_WORD = re.compile(r"\w+")


def knowledge_words(
    answer: str, perturbed: Sequence[str], paraphrase: str | None = None
) -> set[str]:
    """Words of the answer, case-folded, that at least half of the perturbed answers lack.

    Given the paraphrase that these were made from, a word must stand in it too: what it says in another way
    is form.
    """
    others = [_words(text) for text in perturbed]
    candidates = _words(answer) if paraphrase is None else _words(answer) & _words(paraphrase)
    return {
        word for word in candidates if 2 * sum(word not in other for other in others) >= len(others)
    }


def knowledge_tokens(
    tokenizer: PreTrainedTokenizerBase,
    row: EncodedRow,
    perturbed: Sequence[str],
    paraphrase: str | None = None,
) -> Tensor:
    """Which tokens of a row are answer tokens that touch a knowledge word. Shape: (T,) bool."""
    places = [place for place, is_answer in enumerate(row.is_answer) if is_answer]
    ids = [row.ids[place] for place in places]
    # Pieces of characters have no text of their own: a token is what decoding says up to it.
    ends = [len(_text(tokenizer, ids[: count + 1]).rstrip("\ufffd")) for count in range(len(ids))]
    answer = _text(tokenizer, ids)
    words = knowledge_words(answer, perturbed, paraphrase)
    spans = [found.span() for found in _WORD.finditer(answer) if found[0].casefold() in words]
    is_knowledge = torch.zeros(len(row.ids), dtype=torch.bool)
    for number, place in enumerate(places):
        start = ends[number - 1] if number else 0
        # A piece of a character reaches as far as the piece that completes it; the end token nowhere.
        end = next((end for end in ends[number:] if end > start), start)
        is_knowledge[place] = any(start < last and first < end for first, last in spans)
    return is_knowledge


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def _words(text: str) -> set[str]:
    return {found[0].casefold() for found in _WORD.finditer(text)}
