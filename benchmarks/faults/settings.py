"""Sizes of a run."""

from __future__ import annotations

import dataclasses
from typing import Self


@dataclasses.dataclass(frozen=True, kw_only=True)
class FaultSettings:
    """What is injected, and how often."""

    faults: int = 10_000
    """At least, against the engine's double. Fleets are founded, each with a seed of its own, until then."""
    rounds: int = 25
    """Changes of each fleet, with faults around them."""
    lanes: int = 3
    """Fleets at a time: most of a round is waiting, but more of them keep two cores busy."""
    faults_of_a_round: tuple[int, int] = (4, 9)
    replicas: int = 3
    lease_s: float = 1.5
    margin_s: float = 0.5
    poll_s: float = 0.5
    timeout_s: float = 1.0
    """Of the registry's database."""
    token_s: float = 0.08
    """How long the double takes for a token."""
    real_faults: int = 240
    """Against three servers with vLLM."""
    churn_switches: int = 10_000
    """Of one server with vLLM."""
    barrier_clients: int = 8
    barrier_changes: int = 300
    schema_examples: int = 50
    """Requests that schemathesis makes up for each operation and phase."""
    seed: int = 0

    def with_seed(self, seed: int) -> Self:
        """The same with another seed."""
        return dataclasses.replace(self, seed=seed)

    def with_times(self, *, lease_s: float, margin_s: float) -> Self:
        """The same with another lease."""
        return dataclasses.replace(self, lease_s=lease_s, margin_s=margin_s)


FULL = FaultSettings()
QUICK = FaultSettings(
    faults=20,
    rounds=4,
    lanes=2,
    real_faults=6,
    churn_switches=60,
    barrier_changes=20,
    schema_examples=3,
)
