"""Sizes of a run."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is done how often."""

    load_s: float = 30.0
    """Of steady load before and after."""
    num_streams: int = 8
    num_tokens: int = 48
    """Of each answer."""
    num_traces: int = 20
    num_loads: int = 5
    """First loads of the console."""
    kills_of_a_state: int = 2
    """Of the server at each of six states, and twice as many of the job at each of two."""
    seed: int = 0


FULL = Settings()
QUICK = Settings(load_s=10.0, num_traces=5, num_loads=2, kills_of_a_state=1)
