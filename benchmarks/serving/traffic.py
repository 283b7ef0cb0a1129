"""Prompts as token ids: prose, or prose with the names of a forget domain in it."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from .names import TokenIds
from .settings import FORGET_EVERY

NAME_STRIDE = 32
"""Tokens from one name of a forget prompt to the next, half of the evidence window."""
_PROMPT_STRIDE = 997
"""Tokens of prose from the start of one prompt to that of the next."""


class TrafficKind(enum.StrEnum):
    """What a batch or a replay consists of."""

    RETAIN = "retain"
    """No token calls for an expert."""
    MIXED = "mixed"
    """Every tenth request is of a forget domain."""
    FORGET = "forget"
    """Every request is, the active domains in turn."""


class Traffic:
    """Draws prompts; the same arguments give the same ones."""

    def __init__(
        self, prose: TokenIds, names: Sequence[Sequence[TokenIds]], *, num_domains: int
    ) -> None:
        """`names` by domain; the first `num_domains` are active."""
        self._prose = prose
        self._names = names[:num_domains]

    def prompts(
        self, kind: TrafficKind, lengths: Sequence[int], *, start: int = 0
    ) -> list[TokenIds]:
        """One prompt of each length, in tokens; `start` numbers the first, and tells calls apart."""
        return [
            self.prompt(kind, length, number) for number, length in enumerate(lengths, start=start)
        ]

    def prompt(self, kind: TrafficKind, length: int, number: int) -> TokenIds:
        """A prompt by its number in the traffic."""
        place = number * _PROMPT_STRIDE % (len(self._prose) - length)
        ids = self._prose[place : place + length]
        if kind is TrafficKind.FORGET:
            return self._with_names(ids, number)
        if kind is TrafficKind.MIXED and number % FORGET_EVERY == 0:
            return self._with_names(ids, number // FORGET_EVERY)
        return ids

    def _with_names(self, ids: TokenIds, number: int) -> TokenIds:
        """A domain's name at the start, at the end, and every 32 tokens between them."""
        names = self._names[number % len(self._names)]
        name = names[number // len(self._names) % len(names)]
        changed = list(ids)
        for end in (len(name), *range(len(ids), 2 * len(name) - 1, -NAME_STRIDE)):
            changed[end - len(name) : end] = name
        return changed[-len(ids) :]
