"""What the rest of the server may ask of an engine. vLLM stays behind this seam."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, TypedDict

from alter_core.config import AlterConfig
from alter_core.errors import UnsupportedEngineError

InFlight = Literal["recompute", "abort"]
"""What happens to running requests at a switch: recomputed under the new experts, or aborted."""


def check_servable(config: AlterConfig) -> None:
    """Raises: UnsupportedEngineError for readings of the method that exist for ablation only."""
    if config.router != "evidence" or config.entropy_source != "estimator":
        raise UnsupportedEngineError(
            "This substrate is for the reference path only",
            expected="router 'evidence' with entropy_source 'estimator'",
            got=f"router {config.router!r} with entropy_source {config.entropy_source!r}",
            fix="The scalar router cannot route, and two passes need a second set of keys and "
            "values; train the substrate with the defaults to serve it.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwitchReport:
    """One finished switch."""

    epoch: int
    """The epoch that began with it."""
    stage_s: float
    """Reading and verifying on the workers, before the pause."""
    pause_s: float
    """For how long no token was generated."""
    kept_requests: int
    """Running requests that neither the expert that went nor the one that came touches; they went on."""
    recomputed_requests: int
    """Running requests that were computed again from their first token."""
    recomputed_tokens: int
    """Tokens of those that had been computed before the pause."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class CanaryReport:
    """A planted expert changed the logits at every site, and left no trace."""

    num_sites: int
    min_logit_change: float
    """Smallest largest-logprob change over the sites, nats."""
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineState:
    """What every worker says that it applies."""

    epoch: int
    digests: tuple[str | None, ...]
    """Bundle digest by slot; None for an empty slot."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutedTokens:
    """Tokens computed so far by one expert since it entered its slot (slot None: the retain expert)."""

    slot: int | None
    high: int
    """On the high-entropy path of Eq. 9."""
    low: int
    """On the low-entropy path."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TracedToken:
    """How one token was routed."""

    token_id: int
    entropy: float
    """Tsallis, as the estimator gives it."""
    is_high: bool
    """The path of Eq. 9 that it took."""
    weights: tuple[tuple[int | None, float], ...]
    """Slot (None: the retain expert) and weight of each expert in the sum; none: the base weights alone."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Routes of a text under one set of experts."""

    state: EngineState
    tokens: tuple[TracedToken, ...]


class Message(TypedDict):
    """Of a chat."""

    role: str
    content: str


class PromptToken(NamedTuple):
    """One token of a prompt."""

    token_id: int
    text: str
    """What it adds to the text before it."""


class Prompts(Protocol):
    """Makes prompts as the server's own routes do."""

    async def read(self, prompt: str | Sequence[Message]) -> tuple[PromptToken, ...]:
        """The tokens of a text, or of a chat: with the beginning of an answer, unless it ends in one.

        Raises: PromptError.
        """
        ...


class Writer(Protocol):
    """Has the served model write."""

    async def write(self, prompt: str | Sequence[Message], *, max_tokens: int) -> str:
        """The greedy continuation of a text, or answer to a chat, as a request of its own.

        Raises: PromptError; EngineError if nothing may be generated.
        """
        ...


class ForgetEngine(Protocol):
    """Applies forget experts to a running engine."""

    async def switch(
        self,
        *,
        epoch: int,
        slot: int,
        bundle: Path | None,
        digest: str | None,
        in_flight: InFlight = "recompute",
    ) -> SwitchReport:
        """Puts the expert at `bundle` into `slot` (None empties it) as one linearizable change.

        Reads and verifies before the pause. From the return on, every token of every request equals
        what a fresh request under the new experts would give.

        Raises: BundleError, and nothing has changed; SwitchError, and the previous experts are active
        again; EngineError otherwise, and the engine must not answer any more (`is_trusted` is False).
        """
        ...

    @property
    def is_trusted(self) -> bool:
        """False once the engine could not prove what it applies; generation must then be refused."""
        ...

    async def state(self) -> EngineState:
        """What the workers apply. Raises: EngineError if they disagree."""
        ...

    async def routed_tokens(self) -> list[RoutedTokens]:
        """Counts for the retain expert and every occupied slot."""
        ...

    async def trace(self, token_ids: Sequence[int]) -> Trace:
        """Computes a text as a request of its own, from its first token on, and tells how it was routed.

        Traces come one after another; other requests go on. Raises: EngineError.
        """
        ...

    async def run_canary(self) -> CanaryReport:
        """Plants an expert at each site in turn, and removes it again. Only while no domain is active.

        Raises: CanaryError.
        """
        ...
