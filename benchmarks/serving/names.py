"""Made-up names, which set off the experts of their domain and nothing else."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from transformers import PreTrainedTokenizerFast

from alter_cli.demo import author_facts as facts

NUM_DOMAINS = 256
"""Domains that have names. The names of the first are the same however many are used."""

TokenIds = list[int]


def domain_names(
    tokenizer: PreTrainedTokenizerFast, *, names_per_domain: int, ngram: int, seed: int
) -> list[list[TokenIds]]:
    """Token ids of every domain's names, each with a space before it.

    No two of them end in the same `ngram` tokens, and none is shorter.
    """
    found: dict[tuple[int, ...], TokenIds] = {}
    for text in _texts(random.Random(seed)):
        ids = tokenizer(" " + text)["input_ids"]
        if len(ids) >= ngram:
            found.setdefault(tuple(ids[-ngram:]), ids)
        if len(found) == NUM_DOMAINS * names_per_domain:
            break
    names = list(found.values())
    return [
        names[start : start + names_per_domain] for start in range(0, len(names), names_per_domain)
    ]


def _texts(drawn: random.Random) -> Iterator[str]:
    while True:
        yield f"{_word(drawn, facts.GIVEN_ENDS)} {_word(drawn, facts.SURNAME_ENDS)}"


def _word(drawn: random.Random, ends: Sequence[str]) -> str:
    parts = (facts.ONSETS, facts.VOWELS, facts.MIDDLES, ends)
    return "".join(drawn.choice(part) for part in parts)
