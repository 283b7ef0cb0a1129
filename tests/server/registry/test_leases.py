"""Once a change holds everywhere, no server generates without it, whatever servers and clocks do."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from server.registry import Barrier, Heartbeat, Lease, Registry

from .conftest import LEASE_S, MARGIN_S, activation, postgres_place, sqlite_place

NUM_SERVERS = 3
SERVERS = st.integers(0, NUM_SERVERS - 1)


@dataclasses.dataclass
class Server:
    """A server that keeps to the rules: it generates while its lease lasts, by its own clock."""

    replica_id: str
    applied: int = 0
    has_started: bool = False
    generates_until: float = 0.0


class LeaseMachine(RuleBasedStateMachine):
    """See the module."""

    registry_kind: type[Registry] = Registry

    def __init__(self, socket: str | None = None) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        if socket is None:
            folder = self.stack.enter_context(tempfile.TemporaryDirectory())
            self.place = sqlite_place(Path(folder) / "registry.db", self.stack)
        else:
            self.place = postgres_place(socket, self.stack)
        self.now = 0.0
        """Of the servers' clocks."""
        self.jump = 0.0
        """By how much the database's is ahead."""
        self.appended_at: list[float] = []
        self.held = 0
        """The highest epoch that was found to hold everywhere."""

    def teardown(self) -> None:
        self.stack.close()

    @initialize()
    def start(self) -> None:
        self.registry = self.place.open(kind=self.registry_kind)
        self.servers = [Server(f"server-{index}") for index in range(NUM_SERVERS)]

    @rule()
    def append(self) -> None:
        change = self.registry.append(activation("authors", len(self.appended_at) + 1)).change
        self.appended_at.append(self.now)
        assert change.epoch == len(self.appended_at)

    @rule(server=SERVERS)
    def apply_all(self, server: int) -> None:
        self.servers[server].applied = self.registry.head()

    @rule(server=SERVERS)
    def apply_one(self, server: int) -> None:
        mine = self.servers[server]
        mine.applied = min(mine.applied + 1, self.registry.head())

    @rule(server=SERVERS, delay=st.sampled_from([0.0, 0.0, 3.0]))
    def report(self, server: int, delay: float) -> None:
        """The answer may be late; the lease counts from before the question."""
        mine = self.servers[server]
        sent = self.now
        lease = self.registry.heartbeat(
            Heartbeat(replica_id=mine.replica_id, applied_epoch=mine.applied, state="serving")
        )
        assert lease.head == len(self.appended_at)
        assert lease.duration_s <= LEASE_S
        if mine.applied == lease.head:
            assert lease.duration_s == LEASE_S
        self.pass_time(delay)
        self.take(mine, sent, lease)

    def take(self, mine: Server, sent: float, lease: Lease) -> None:
        mine.generates_until = max(mine.generates_until, sent + lease.duration_s)

    @rule(server=SERVERS)
    def fail(self, server: int) -> None:
        mine = self.servers[server]
        mine.generates_until = 0.0
        self.registry.heartbeat(
            Heartbeat(replica_id=mine.replica_id, applied_epoch=mine.applied, state="failed")
        )

    @rule(server=SERVERS, is_clean=st.booleans())
    def restart(self, server: int, is_clean: bool) -> None:
        old = self.servers[server]
        if is_clean:
            self.registry.release(old.replica_id)
        self.servers[server] = Server(old.replica_id + "+")

    @rule(seconds=st.sampled_from([0.3, 1.0, 4.0, LEASE_S, LEASE_S + MARGIN_S]))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.place.advance(seconds)

    @rule(jump=st.sampled_from([-MARGIN_S / 2 + 0.2, 0.0, MARGIN_S / 2 - 0.2]))
    def set_the_clock(self, jump: float) -> None:
        """The database's clock goes astray, by less than the margin from one extreme to the other."""
        self.place.advance(jump - self.jump)
        self.jump = jump

    @invariant()
    def what_holds_everywhere_goes_on_holding(self) -> None:
        for epoch in range(self.held + 1, len(self.appended_at) + 1):
            barrier = self.registry.barrier(epoch)
            if self.now > self.appended_at[epoch - 1] + LEASE_S + 2 * MARGIN_S:
                assert barrier.is_passed, "a change holds in bounded time"
            if not barrier.is_passed:
                break
            self.held = epoch
        for server in self.servers:
            is_stale = server.applied < self.held
            assert not is_stale or self.now >= server.generates_until, "a stale server generates"
        if self.held:
            assert self.registry.barrier(self.held).is_passed


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_no_server_generates_without_a_change_that_holds(
    kind: str, request: pytest.FixtureRequest
) -> None:
    socket = request.getfixturevalue("postgres_socket") if kind == "postgresql" else None
    run_state_machine_as_test(
        lambda: LeaseMachine(socket),
        settings=settings(
            max_examples=60 if kind == "sqlite" else 10,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


class ServerGoesOn(LeaseMachine):
    """Once granted, a lease never ends."""

    def take(self, mine: Server, sent: float, lease: Lease) -> None:
        if lease.duration_s > 0:
            mine.generates_until = float("inf")


class ServerCountsFromTheAnswer(LeaseMachine):
    """A lease begins when the server hears of it."""

    def take(self, mine: Server, sent: float, lease: Lease) -> None:
        super().take(mine, self.now, lease)


class AnybodysBarrier(Registry):
    """Is passed once one server has applied the change."""

    def barrier(self, epoch: int) -> Barrier:
        found = super().barrier(epoch)
        has_one = any(r.holds_lease and r.applied_epoch >= epoch for r in self.replicas())
        return dataclasses.replace(found, lagging=()) if has_one else found


class LeasesForLaggards(Registry):
    """Grants a lease whatever the server has applied."""

    def heartbeat(self, heartbeat: Heartbeat) -> Lease:
        return dataclasses.replace(super().heartbeat(heartbeat), duration_s=LEASE_S)


class RegistryWithAnybodysBarrier(LeaseMachine):
    registry_kind = AnybodysBarrier


class RegistryWithLeasesForLaggards(LeaseMachine):
    registry_kind = LeasesForLaggards


Step = tuple[Callable[..., None], dict[str, object]]
PAUSE: list[Step] = [(LeaseMachine.pass_time, {"seconds": s}) for s in (4.0, 4.0, 1.0, 0.3)]


@pytest.mark.parametrize(
    ("broken", "steps"),
    [
        pytest.param(
            ServerGoesOn,
            [
                (LeaseMachine.report, {"server": 0, "delay": 0.0}),
                (LeaseMachine.append, {}),
                *PAUSE,
                *PAUSE,
            ],
            id="a server goes on after its lease",
        ),
        pytest.param(
            ServerCountsFromTheAnswer,
            [
                (LeaseMachine.report, {"server": 0, "delay": 3.0}),
                (LeaseMachine.append, {}),
                *PAUSE,
            ],
            id="a server counts from the answer",
        ),
        pytest.param(
            RegistryWithAnybodysBarrier,
            [
                (LeaseMachine.report, {"server": 0, "delay": 0.0}),
                (LeaseMachine.append, {}),
                (LeaseMachine.apply_all, {"server": 1}),
                (LeaseMachine.report, {"server": 1, "delay": 0.0}),
            ],
            id="a barrier asks only some",
        ),
        pytest.param(
            RegistryWithLeasesForLaggards,
            [
                (LeaseMachine.append, {}),
                (LeaseMachine.report, {"server": 0, "delay": 0.0}),
            ],
            id="a laggard gets a lease",
        ),
    ],
)
def test_what_is_broken_is_found(broken: type[LeaseMachine], steps: list[Step]) -> None:
    def play(machine: LeaseMachine) -> None:
        try:
            machine.start()
            for step, fields in steps:
                step(machine, **fields)
                machine.what_holds_everywhere_goes_on_holding()
        finally:
            machine.teardown()

    play(LeaseMachine())
    with pytest.raises(AssertionError, match="a stale server generates"):
        play(broken())
