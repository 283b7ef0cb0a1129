"""The log against a model: several servers append, race, repeat and restart in any order."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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

from alter_core.errors import (
    AlterError,
    DomainConflictError,
    DomainNotFoundError,
    EpochConflictError,
    IdempotencyConflictError,
    NoFreeSlotError,
)
from server.registry import Appended, ChangeRequest, IdempotencyKey, Registry
from server.registry.registry import IDEMPOTENCY_KEY_LIFE

from .conftest import (
    MAX_DOMAINS,
    Place,
    activation,
    digest,
    postgres_place,
    revocation,
    sqlite_place,
)

NUM_SERVERS = 3
SERVERS = st.integers(0, NUM_SERVERS - 1)
PICKS = st.integers(0, 99)
DOMAINS = st.sampled_from(["a", "b-1", "b2", "c"])
REQUESTS = st.one_of(
    st.builds(activation, DOMAINS, st.integers(1, 5)), st.builds(revocation, DOMAINS)
)
EXPECTED = st.sampled_from([None, "head", "stale", "future"])


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the model knows of one change."""

    domain: str
    digest: str | None
    slot: int


@dataclasses.dataclass(frozen=True)
class Sent:
    """A request that was acknowledged under a key."""

    request: ChangeRequest
    key: IdempotencyKey
    operation_id: str
    expected_epoch: int | None


class Model:
    """The log written as plainly as can be."""

    def __init__(self) -> None:
        self.log: list[Entry] = []

    def active(self, epoch: int | None = None) -> dict[str, Entry]:
        active: dict[str, Entry] = {}
        for entry in self.log[:epoch]:
            active.pop(entry.domain, None)
            if entry.digest is not None:
                active[entry.domain] = entry
        return active

    def append(self, request: ChangeRequest, expected: int | None) -> type[AlterError] | int:
        """The epoch that answers the request, or the error."""
        active = self.active()
        mine = active.get(request.domain)
        if expected is not None and expected != len(self.log):
            return EpochConflictError
        if request.action == "revoke" and mine is None:
            return DomainNotFoundError
        if mine is not None and mine.digest == request.bundle_digest:
            return max(i for i, e in enumerate(self.log, start=1) if e.domain == request.domain)
        if request.bundle_digest in [e.digest for e in active.values()]:
            return DomainConflictError
        free = sorted(set(range(MAX_DOMAINS)) - {e.slot for e in active.values()})
        if mine is None and not free:
            return NoFreeSlotError
        slot = free[0] if mine is None else mine.slot
        self.log.append(Entry(request.domain, request.bundle_digest, slot))
        return len(self.log)


class LogMachine(RuleBasedStateMachine):
    """See the module. What is drawn never depends on how a race went, which may go otherwise next time."""

    def __init__(self, make_place: Callable[[contextlib.ExitStack], Place]) -> None:
        super().__init__()
        self.stack = contextlib.ExitStack()
        self.place = make_place(self.stack)
        self.model = Model()
        self.operations: list[str] = []
        """Of the acknowledged changes, by epoch."""
        self.sent: list[Sent] = []
        self.num_keys = 0

    def teardown(self) -> None:
        self.stack.close()

    @initialize()
    def start(self) -> None:
        self.servers = [self.place.open() for _ in range(NUM_SERVERS)]
        self.pool = self.stack.enter_context(ThreadPoolExecutor(NUM_SERVERS))

    def _expected(self, kind: str | None) -> int | None:
        head = len(self.model.log)
        return {None: None, "head": head, "stale": max(0, head - 1), "future": head + 1}[kind]

    def _check(
        self, answer: Appended | AlterError, wanted: type[AlterError] | int, before: int
    ) -> None:
        if isinstance(wanted, type):
            assert type(answer) is wanted
            return
        assert isinstance(answer, Appended), answer
        assert answer.change.epoch == wanted
        assert answer.outcome == ("recorded" if wanted > before else "unchanged")
        assert answer.head == len(self.model.log)
        if answer.outcome == "recorded":
            self.operations.append(answer.change.operation_id)
        assert answer.change.operation_id == self.operations[wanted - 1]

    @rule(server=SERVERS, request=REQUESTS, kind=EXPECTED, has_key=st.booleans())
    def append(self, server: int, request: ChangeRequest, kind: str | None, has_key: bool) -> None:
        expected, before = self._expected(kind), len(self.model.log)
        self.num_keys += 1
        key = IdempotencyKey(key=f"key-{self.num_keys}", request_digest=digest(self.num_keys))
        answer = attempt(self.servers[server], request, expected, key if has_key else None)
        self._check(answer, self.model.append(request, expected), before)
        if has_key and isinstance(answer, Appended):
            self.sent.append(Sent(request, key, answer.change.operation_id, expected))

    @rule(server=SERVERS, pick=PICKS)
    def repeat(self, server: int, pick: int) -> None:
        if not self.sent:
            return
        sent = self.sent[pick % len(self.sent)]
        answer = attempt(self.servers[server], sent.request, sent.expected_epoch, sent.key)
        assert isinstance(answer, Appended)
        assert (answer.outcome, answer.change.operation_id) == ("replayed", sent.operation_id)

    @rule(server=SERVERS, pick=PICKS, request=REQUESTS)
    def reuse_a_key(self, server: int, pick: int, request: ChangeRequest) -> None:
        if not self.sent:
            return
        key = dataclasses.replace(self.sent[pick % len(self.sent)].key, request_digest=digest(0))
        answer = attempt(self.servers[server], request, None, key)
        assert isinstance(answer, IdempotencyConflictError)

    @rule(requests=st.lists(REQUESTS, min_size=2, max_size=NUM_SERVERS), is_checked=st.booleans())
    def race(self, requests: list[ChangeRequest], is_checked: bool) -> None:
        """Whoever wins: the answers are those of some order, which the log tells."""
        before = len(self.model.log)
        expected = before if is_checked else None
        answers = list(
            self.pool.map(
                lambda pair: attempt(pair[0], pair[1], expected, None),
                zip(self.servers, requests, strict=False),
            )
        )
        pairs = list(zip(requests, answers, strict=True))
        recorded = sorted(
            (p for p in pairs if isinstance(p[1], Appended) and p[1].outcome == "recorded"),
            key=lambda pair: pair[1].change.epoch,
        )
        assert len(recorded) <= (1 if is_checked else len(requests))
        for request, answer in recorded:
            self._check(answer, self.model.append(request, expected), len(self.model.log) - 1)
            expected = None
        # Every other answer is right at some moment of the race.
        for request, answer in pairs:
            if (request, answer) not in recorded:
                assert any(
                    agrees(answer, self._at(moment).append(request, before if is_checked else None))
                    for moment in range(before, len(self.model.log) + 1)
                )

    def _at(self, epoch: int) -> Model:
        model = Model()
        model.log = self.model.log[:epoch]
        return model

    @rule(server=SERVERS)
    def restart(self, server: int) -> None:
        self.servers[server].close()
        self.servers[server] = self.place.open()

    @rule(server=SERVERS, pick=PICKS)
    def outlive_all_keys(self, server: int, pick: int) -> None:
        if not self.sent:
            return
        sent = self.sent[pick % len(self.sent)]
        self.sent.clear()
        self.place.advance(2 * IDEMPOTENCY_KEY_LIFE.total_seconds())
        before = len(self.model.log)
        answer = attempt(self.servers[server], sent.request, None, sent.key)
        self._check(answer, self.model.append(sent.request, None), before)

    @rule(server=SERVERS, pick=PICKS)
    def look_back(self, server: int, pick: int) -> None:
        epoch = pick % (len(self.model.log) + 1)
        state = self.servers[server].desired_state(epoch)
        assert [Entry(c.domain, c.bundle_digest, c.slot) for c in state.domains] == [
            entry for _, entry in sorted(self.model.active(epoch).items())
        ]

    @invariant()
    def the_log_is_the_models(self) -> None:
        for server in self.servers:
            changes = server.changes_since(0)
            assert [c.epoch for c in changes] == list(range(1, len(self.model.log) + 1))
            assert [Entry(c.domain, c.bundle_digest, c.slot) for c in changes] == self.model.log
            assert [c.operation_id for c in changes] == self.operations
            assert server.head() == len(self.model.log)


def agrees(answer: Appended | AlterError, wanted: type[AlterError] | int) -> bool:
    if isinstance(wanted, type):
        return type(answer) is wanted
    return isinstance(answer, Appended) and answer.change.epoch == wanted


def attempt(
    registry: Registry,
    request: ChangeRequest,
    expected_epoch: int | None,
    key: IdempotencyKey | None,
) -> Appended | AlterError:
    try:
        return registry.append(request, expected_epoch=expected_epoch, idempotency=key)
    except AlterError as error:
        return error


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_the_log_behaves_as_its_model(kind: str, request: pytest.FixtureRequest) -> None:
    socket = request.getfixturevalue("postgres_socket") if kind == "postgresql" else ""

    def make_place(stack: contextlib.ExitStack) -> Place:
        if kind == "postgresql":
            return postgres_place(socket, stack)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        return sqlite_place(Path(folder) / "registry.db", stack)

    run_state_machine_as_test(
        lambda: LogMachine(make_place),
        settings=settings(
            max_examples=25 if kind == "sqlite" else 10,  # a database each
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
