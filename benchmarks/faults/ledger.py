"""What was promised and what was generated, and whether they fit."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Sequence

from server.registry import Change


@dataclasses.dataclass(frozen=True)
class Token:
    """One token that a client was given."""

    replica: str
    at: float
    """When it was computed, on the machine's monotonic clock."""
    epoch: int
    """Under which it was computed, as the server says."""
    active: frozenset[str]
    """Digests of the experts that it was computed with."""


@dataclasses.dataclass(frozen=True)
class Acknowledged:
    """A change that somebody was told is recorded."""

    operation_id: str
    epoch: int
    domain: str
    digest: str | None


class Ledger:
    """What clients have seen, in the order in which they saw it."""

    def __init__(self) -> None:
        self._active: list[tuple[float, int]] = []
        self.acknowledged: dict[str, Acknowledged] = {}
        self._tokens: list[Token] = []
        self.num_tokens = 0
        self.violations: list[str] = []
        self.num_violations = 0

    def acknowledge(self, change: Acknowledged) -> None:
        """Somebody was told that a change is recorded."""
        self.acknowledged[change.operation_id] = change

    def is_active(self, epoch: int, at: float) -> None:
        """Somebody was told, at that time, that an epoch holds everywhere."""
        if not self._active or epoch > self._active[-1][1]:
            self._active.append((at, epoch))

    def generated(self, token: Token) -> None:
        """A client was given a token."""
        self._tokens.append(token)

    def check(self, log: Sequence[Change]) -> None:
        """Checks the tokens since the last call against the log; it must hold all that they name."""
        tokens, self._tokens = self._tokens, []
        desired = _desired_by_epoch(log)
        times = [at for at, _ in self._active]
        for token in tokens:
            self.num_tokens += 1
            place = bisect.bisect_right(times, token.at)
            required = self._active[place - 1][1] if place else 0
            if token.epoch < required:
                self._violated(
                    f"{token.replica}: a token under {token.epoch}, {required} is active"
                )
            elif token.epoch >= len(desired):
                self._violated(
                    f"{token.replica}: a token under {token.epoch}, which nobody recorded"
                )
            elif token.active != desired[token.epoch]:
                self._violated(f"{token.replica}: other experts than those of epoch {token.epoch}")

    def lost(self, log: Iterable[Change]) -> list[Acknowledged]:
        """Acknowledged changes that the log does not hold as they were acknowledged."""
        held = {
            c.operation_id: Acknowledged(c.operation_id, c.epoch, c.domain, c.bundle_digest)
            for c in log
        }
        return [a for key, a in self.acknowledged.items() if held.get(key) != a]

    def _violated(self, what: str) -> None:
        self.num_violations += 1
        if len(self.violations) < 20:
            self.violations.append(what)


def _desired_by_epoch(log: Sequence[Change]) -> list[frozenset[str]]:
    """What every server is to apply at each epoch, worked out from the log alone."""
    domains: dict[str, str] = {}
    found = [frozenset[str]()]
    for change in log:
        if change.bundle_digest is None:
            domains.pop(change.domain, None)
        else:
            domains[change.domain] = change.bundle_digest
        found.append(frozenset(domains.values()))
    return found
