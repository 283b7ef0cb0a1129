"""A small model of a fleet, and every state that it can reach.

Replicas, a registry with its leases and its barrier, a network that delays and loses, and clocks that do not
run alike. Time goes in ticks. The rules are those of `server/registry/registry.py` and
`server/reconciler.py`; each can be broken on purpose (`Rules`), to see that the search would notice.

Left out because it only makes the fleet wait: rows of processes that are gone, a database clock that is set
back, more than one question of a replica under way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """What the fleet does. The defaults are right; every other value is a defect."""

    lease: int = 2
    margin: int = 1
    """By how many ticks the registry lets a lease last longer than its holder."""
    skew: int = 1
    """By how many ticks a replica's clock may fall behind between a question and the end of its lease."""
    holder_stops: bool = True
    """A replica whose lease is over generates nothing."""
    counts_from: Literal["question", "answer"] = "question"
    """From when a holder counts its lease."""
    barrier: Literal["all", "any", "none"] = "all"
    """How many of the lease holders must have applied a change before it is called active."""
    prolongs_laggards: bool = False
    """A lease of a replica that lags is prolonged beyond the change that it lacks."""
    grants_to_laggards: bool = False
    """A replica that lags and has no lease gets one."""
    reports: Literal["committed", "begun"] = "committed"
    """Which epoch a replica reports during a switch."""
    start: Literal["desired", "empty"] = "desired"
    """What a replica that starts holds when it says that it serves."""
    waits_for_lease: bool = True
    """A replica that starts generates only once it was granted a lease."""
    failing: Literal["stops first", "reports first"] = "stops first"
    """What a replica does first that cannot go on."""


class Message(NamedTuple):
    """A heartbeat under way, or its answer."""

    age: int
    """Ticks of the replica's clock since it was sent."""
    applied: int
    state: str
    granted: int | None
    """Of an answer; None in a question."""
    skew: int
    """Ticks by which the replica's clock may still fall behind, counted from the question."""


class Replica(NamedTuple):
    """One process, with its row in the registry."""

    phase: str = "down"
    """`down`, `starting`, `serving`, `paused` (before the commit), `committed` (after it, not resumed),
    `failing` (could not go on, and has not said so)."""
    applied: int = 0
    target: int = 0
    lease: int = 0
    """Ticks left, by its own clock."""
    skew: int = 0
    """The same for the lease that it holds."""
    message: Message | None = None
    row_applied: int = 0
    row_lease: int | None = None
    """Ticks left by the registry's clock, margin included. None: never, or given back."""

    def generates(self, rules: Rules) -> bool:
        """True if the next token may come at any moment."""
        if self.phase == "failing":
            return rules.failing == "reports first"
        if self.phase != "serving":
            return False
        return self.lease > 0 or not rules.holder_stops


class State(NamedTuple):
    """The fleet."""

    replicas: tuple[Replica, ...]
    ages: tuple[int, ...] = ()
    """Of every change, in ticks; as many as there are epochs."""
    active: int = 0
    """The highest epoch that the registry has called active."""


@dataclasses.dataclass(frozen=True)
class Violation:
    """How the fleet got where it must not be."""

    what: str
    trace: tuple[str, ...]


class Explorer:
    """Searches all states breadth first, so the trace of a violation is a shortest one."""

    def __init__(self, rules: Rules, *, num_replicas: int, num_changes: int) -> None:
        self._rules = rules
        self._num_changes = num_changes
        self._start = State(replicas=(Replica(),) * num_replicas)
        self.num_states = 0

    def search(self) -> Violation | None:
        """None if no reachable state violates anything."""
        came_from: dict[State, tuple[State, str] | None] = {self._start: None}
        frontier = [self._start]
        while frontier:
            found: list[State] = []
            for state in frontier:
                for name, successor in self._steps(state):
                    if successor in came_from:
                        continue
                    came_from[successor] = (state, name)
                    if (what := self._violation(successor)) is not None:
                        return Violation(what, _trace(came_from, successor))
                    found.append(successor)
            frontier = found
        self.num_states = len(came_from)
        return None

    def _violation(self, state: State) -> str | None:
        for replica in state.replicas:
            if replica.applied < state.active and replica.generates(self._rules):
                return f"a token under epoch {replica.applied} while {state.active} is active"
        overdue = self._rules.lease + self._rules.margin
        for epoch, age in enumerate(state.ages, start=1):
            if age > overdue and not self._is_passed(state, epoch):
                return f"epoch {epoch} is not active after {age} ticks"
        return None

    def _is_passed(self, state: State, epoch: int) -> bool:
        holders = [r for r in state.replicas if r.row_lease is not None and r.row_lease > 0]
        has_applied = [r.row_applied >= epoch for r in holders]
        if self._rules.barrier == "none":
            return True
        if self._rules.barrier == "any":
            return not has_applied or any(has_applied)
        return all(has_applied)

    def _steps(self, state: State) -> Iterator[tuple[str, State]]:
        head = len(state.ages)
        if head < self._num_changes:
            yield f"append {head + 1}", state._replace(ages=(*state.ages, 0))
        if state.active < head and self._is_passed(state, state.active + 1):
            yield f"{state.active + 1} is active", state._replace(active=state.active + 1)
        yield "tick", self._tick(state, late=None)
        for index, replica in enumerate(state.replicas):
            if _may_fall_behind(replica):
                yield f"tick, {index} behind", self._tick(state, late=index)
            for name, successor in self._replica_steps(state, replica):
                replicas = list(state.replicas)
                replicas[index] = successor
                # Replicas are alike: their order says nothing.
                yield f"{index} {name}", state._replace(replicas=tuple(sorted(replicas, key=hash)))

    def _replica_steps(self, state: State, mine: Replica) -> Iterator[tuple[str, Replica]]:
        head = len(state.ages)
        if mine.phase == "down":
            target = head if self._rules.start == "desired" else 0
            yield "starts", Replica(phase="starting", target=target)
            return
        yield "crashes", Replica()
        if mine.phase == "starting":
            free = 0 if self._rules.waits_for_lease else self._rules.lease
            yield "is applied", mine._replace(phase="serving", applied=mine.target, lease=free)
            return
        yield from self._network_steps(state, mine)
        if mine.phase == "serving":
            yield "fails", mine._replace(phase="failing")
            if mine.applied < head:
                yield "pauses", mine._replace(phase="paused", target=head)
        elif mine.phase == "paused":
            yield "commits", mine._replace(phase="committed", applied=mine.target)
            yield "rolls back", mine._replace(phase="serving")
        elif mine.phase == "committed":
            yield "resumes", mine._replace(phase="serving")

    def _network_steps(self, state: State, mine: Replica) -> Iterator[tuple[str, Replica]]:
        message = mine.message
        if message is None:
            applied = mine.applied
            if self._rules.reports == "begun" and mine.phase == "paused":
                applied = mine.target
            said = "failed" if mine.phase == "failing" else "serving"
            message = Message(0, applied, said, granted=None, skew=self._rules.skew)
            yield "asks", mine._replace(message=message)
            return
        yield "is not heard", mine._replace(message=None)
        if message.granted is None:
            yield "is heard", self._heartbeat(state, mine, message)
        elif mine.phase == "failing":
            yield "ends", Replica()
        else:
            since = message.age if self._rules.counts_from == "question" else 0
            lease = message.granted - since
            if lease > mine.lease:
                yield "is answered", mine._replace(message=None, lease=lease, skew=message.skew)
            else:
                yield "is answered", mine._replace(message=None)

    def _heartbeat(self, state: State, mine: Replica, message: Message) -> Replica:
        """`Registry.heartbeat`, with times from now on."""
        granted, lease = 0, mine.row_lease
        if message.state == "failed":
            lease = None
        elif (ends := self._lease_end(state, mine, message)) is not None:
            granted = max(0, ends)
            lease = max(ends + self._rules.margin, lease or 0)
        return mine._replace(
            row_applied=message.applied, row_lease=lease, message=message._replace(granted=granted)
        )

    def _lease_end(self, state: State, mine: Replica, message: Message) -> int | None:
        if message.applied >= len(state.ages):
            return self._rules.lease
        has_lease = mine.row_lease is not None and mine.row_lease > self._rules.margin
        if not self._rules.grants_to_laggards and (
            not has_lease or mine.row_applied > message.applied
        ):
            return None
        if self._rules.prolongs_laggards:
            return self._rules.lease
        return self._rules.lease - state.ages[message.applied]

    def _tick(self, state: State, late: int | None) -> State:
        oldest = self._rules.lease + self._rules.margin + 1
        replicas = [
            _pass_time(replica, own=0 if index == late else 1, lease=self._rules.lease)
            for index, replica in enumerate(state.replicas)
        ]
        return state._replace(
            replicas=tuple(sorted(replicas, key=hash)),
            ages=tuple(min(age + 1, oldest) for age in state.ages),
        )


def _may_fall_behind(replica: Replica) -> bool:
    counted = [replica.skew] if replica.lease else []
    counted += [replica.message.skew] if replica.message else []
    return bool(counted) and min(counted) > 0


def _pass_time(replica: Replica, *, own: int, lease: int) -> Replica:
    message = replica.message
    if message is not None:
        message = message._replace(
            age=min(message.age + own, lease), skew=max(0, message.skew - 1 + own)
        )
    own_lease = max(0, replica.lease - own)
    return replica._replace(
        lease=own_lease,
        skew=max(0, replica.skew - 1 + own) if own_lease else 0,
        message=message,
        row_lease=None if replica.row_lease is None else max(0, replica.row_lease - 1),
    )


def _trace(came_from: dict[State, tuple[State, str] | None], state: State) -> tuple[str, ...]:
    steps: list[str] = []
    while (step := came_from[state]) is not None:
        state = step[0]
        steps.append(step[1])
    return tuple(reversed(steps))
