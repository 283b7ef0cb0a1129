"""Sizes of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import torch

from alter_core.machine import fast_dtype

RANK = 8
"""Of the experts, and of the adapter that vLLM serves beside them."""
LORA_ALPHA = 16.0
FORGET_EVERY = 10
"""In mixed traffic every tenth request is of a forget domain."""

GOODPUT_MS: Mapping[str, float] = MappingProxyType({"ttft": 1000.0, "tpot": 100.0})
"""A request counts towards goodput if its first token and its mean later ones come within these."""


def machine_dtype() -> str:
    """What base and ours are served in."""
    return str(fast_dtype()).removeprefix("torch.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """What is measured, and how often."""

    models: tuple[str, ...] = ("25m", "150m")
    """Names of `models.SHAPES`; the figures are the last one's."""
    dtype: str = dataclasses.field(default_factory=machine_dtype)
    """`--dtype` of every engine and server."""
    starts: int = 2
    """How often the engines of offline measurements are started: where a process finds its memory is worth
    several percent of its speed, for as long as it lives."""
    rounds: int = 1
    """How often each case is measured, by start."""
    num_domains: int = 8
    """Active domains where their number is not what is looked at."""
    few_domains: int = 1
    many_domains: int = 256
    """Compared with each other, and with base."""
    other_domains: tuple[int, ...] = (64,)
    """Compared with base only."""
    decode_repeats: Mapping[int, int] = dataclasses.field(
        default_factory=lambda: MappingProxyType({1: 3, 16: 3, 64: 1})
    )
    """By batch size: how many batches are decoded in a round."""
    decode_steps: Mapping[int, int] = dataclasses.field(
        default_factory=lambda: MappingProxyType({1: 8, 16: 5, 64: 4})
    )
    """By batch size: steps that are timed before another engine's turn comes."""
    decode_prompt_tokens: int = 24
    decode_tokens: int = 48
    """At most. A prompt's evidence is in view for as long: the window is 64 tokens."""
    prefill_repeats: Mapping[int, int] = dataclasses.field(
        default_factory=lambda: MappingProxyType({512: 3, 2048: 2})
    )
    """By prompt length, in tokens: how many prompts are computed in a round, by turns."""
    online_rounds: int = 2
    """Replays of each server, after one of all requests at once."""
    online_requests: int = 120
    """Requests of a replay."""
    online_load: float = 0.5
    """Mean request rate, as a share of what base answers when all requests come at once."""
    switches: int = 20
    """Changes under load, activations and revocations in turn."""
    switch_pause_s: float = 1.5
    """Between two of them."""
    startup_rounds: int = 2
    """Starts of each server."""
    seed: int = 0

    @property
    def value_bytes(self) -> int:
        """Of one number in `dtype`."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype.itemsize

    def decode_turns(self, batch: int) -> tuple[int, int]:
        """(steps that are timed in a turn, turns); each turn has one step more, which is not."""
        num_steps = self.decode_steps[batch]
        return num_steps, (self.decode_tokens - 1) // (num_steps + 1)

    @property
    def headline_model(self) -> str:
        """The model that the figures are of."""
        return self.models[-1]


FULL = BenchSettings()
QUICK = BenchSettings(
    models=("25m",),
    starts=1,
    rounds=1,
    num_domains=2,
    many_domains=4,
    other_domains=(),
    decode_repeats=MappingProxyType({1: 1, 16: 1}),
    decode_tokens=16,
    prefill_repeats=MappingProxyType({512: 1}),
    online_rounds=1,
    online_requests=12,
    switches=4,
    startup_rounds=1,
)


def settings_of(*, is_quick: bool, rounds: int | None) -> BenchSettings:
    """Full or quick ones; `rounds`: other than theirs."""
    settings = QUICK if is_quick else FULL
    return settings if rounds is None else dataclasses.replace(settings, rounds=rounds)
