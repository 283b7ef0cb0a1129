"""The log, leases and the barrier, alike on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from itertools import chain
from typing import Any

import psycopg
import pytest
import uvloop

from alter_core.errors import (
    AlterError,
    ChangeRequestError,
    ConfigError,
    DomainConflictError,
    DomainNameError,
    DomainNotFoundError,
    EpochConflictError,
    IdempotencyConflictError,
    NoFreeSlotError,
    OperationNotFoundError,
    RegistryMismatchError,
    RegistryUnavailableError,
)
from server.api.problems import status_of
from server.registry import ChangeRequest, Deployment, Heartbeat, IdempotencyKey, Registry
from server.registry.registry import IDEMPOTENCY_KEY_LIFE, REPLICA_MEMORY

from .conftest import (
    DEPLOYMENT,
    LEASE_S,
    MARGIN_S,
    MAX_DOMAINS,
    Place,
    activation,
    beat,
    digest,
    revocation,
)


def key(name: str = "k", number: int = 1) -> IdempotencyKey:
    return IdempotencyKey(key=name, request_digest=digest(number))


def active(registry: Registry, epoch: int | None = None) -> dict[str, tuple[str | None, int]]:
    state = registry.desired_state(epoch)
    return {change.domain: (change.bundle_digest, change.slot) for change in state.domains}


def test_a_new_registry_is_at_epoch_0_and_wants_nothing(registry: Registry) -> None:
    assert registry.head() == 0
    assert registry.desired_state().epoch == 0
    assert active(registry) == {}
    assert registry.changes_since(0) == ()
    assert registry.barrier(0).is_passed


def test_the_desired_state_of_every_epoch_follows_from_the_log(registry: Registry) -> None:
    requests = [
        activation("authors", 1, reason="case 7", request_id="req-1"),
        activation("books", 2, in_flight="abort"),
        revocation("authors"),
        activation("cooks", 3),
        activation("books", 4),
    ]
    changes = [registry.append(request).change for request in requests]
    assert [c.epoch for c in changes] == [1, 2, 3, 4, 5]
    assert registry.changes_since(0) == tuple(changes)
    assert registry.changes_since(3, limit=1) == (changes[3],)
    first = changes[0]
    assert (first.actor, first.reason, first.request_id) == ("ann", "case 7", "req-1")
    assert changes[1].in_flight == "abort"
    assert first.requested_at <= changes[4].requested_at
    assert first.requested_at.utcoffset() is not None
    assert [active(registry, epoch) for epoch in range(6)] == [
        {},
        {"authors": (digest(1), 0)},
        {"authors": (digest(1), 0), "books": (digest(2), 1)},
        {"books": (digest(2), 1)},
        {"books": (digest(2), 1), "cooks": (digest(3), 0)},
        {"books": (digest(4), 1), "cooks": (digest(3), 0)},
    ]
    assert registry.operation(first.operation_id) == first
    for unknown in ("another", "", "a\0b", "a" * 1000):
        with pytest.raises(OperationNotFoundError):
            registry.operation(unknown)
    with pytest.raises(EpochConflictError):
        registry.desired_state(6)


def test_a_stale_expectation_is_refused_and_records_nothing(registry: Registry) -> None:
    registry.append(activation("authors", 1), expected_epoch=0)
    with pytest.raises(EpochConflictError, match="expected epoch 0; got epoch 1"):
        registry.append(activation("books", 2), expected_epoch=0)
    assert registry.head() == 1
    assert registry.append(activation("books", 2), expected_epoch=1).change.epoch == 2


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (revocation("books"), DomainNotFoundError),
        (activation("books", 1), DomainConflictError),
    ],
)
def test_what_makes_no_sense_is_refused_and_records_nothing(
    registry: Registry, request_: ChangeRequest, error: type[AlterError]
) -> None:
    registry.append(activation("authors", 1))
    with pytest.raises(error):
        registry.append(request_, idempotency=key())
    assert registry.head() == 1
    # The key was not spent on it.
    registry.append(activation("cooks", 3), idempotency=key(number=9))


def test_slots_run_out_and_come_back(registry: Registry) -> None:
    for number in range(MAX_DOMAINS):
        registry.append(activation(f"d{number}", number))
    with pytest.raises(NoFreeSlotError):
        registry.append(activation("more", 9))
    registry.append(revocation("d1"))
    assert registry.append(activation("more", 9)).change.slot == 1


def test_what_is_so_already_is_not_recorded_again(registry: Registry) -> None:
    first = registry.append(activation())
    again = registry.append(activation(in_flight="abort"))
    assert (again.outcome, again.change, again.head) == ("unchanged", first.change, 1)


def test_a_key_makes_a_repetition_the_same_operation(place: Place, registry: Registry) -> None:
    first = registry.append(activation(), expected_epoch=0, idempotency=key())
    registry.append(revocation())
    # Even though its expectation is stale by now, and from another server.
    again = place.open().append(activation(), expected_epoch=0, idempotency=key())
    assert (again.outcome, again.change, again.head) == ("replayed", first.change, 2)
    with pytest.raises(IdempotencyConflictError):
        registry.append(revocation(), idempotency=key(number=2))
    assert registry.head() == 2
    unchanged = registry.append(activation("books", 2), idempotency=key("other"))
    assert registry.append(activation("books", 2), idempotency=key("other")).change == (
        unchanged.change
    )


def test_a_key_expires_by_the_clock_of_the_database(place: Place, registry: Registry) -> None:
    life = IDEMPOTENCY_KEY_LIFE.total_seconds()
    registry.append(activation(), idempotency=key())
    registry.append(revocation())
    place.advance(life - 60)
    assert registry.append(activation(), idempotency=key()).outcome == "replayed"
    place.advance(120)
    assert registry.append(activation(), idempotency=key()).change.epoch == 3


@pytest.mark.parametrize(
    "fields",
    [
        {"action": "forget"},
        {"action": "revoke"},
        {"in_flight": "later"},
        {"bundle_digest": None},
        {"bundle_digest": "sha256:" + "A" * 64},
        {"bundle_digest": "sha256:" + "1" * 64 + "\n"},
        {"actor": ""},
        {"actor": "a" * 129},
        {"request_id": "two\nlines"},
        {"reason": "r" * 201},
        {"reason": "tab\t"},
    ],
)
def test_a_malformed_request_is_refused_without_showing_what_came(fields: dict[str, Any]) -> None:
    whole = {"action": "activate", "domain": "d", "bundle_digest": digest(1), "actor": "ann"}
    with pytest.raises(ChangeRequestError) as refusal:
        ChangeRequest(**(whole | fields))
    assert "two" not in str(refusal.value)
    with pytest.raises(DomainNameError):
        ChangeRequest(**(whole | {"domain": "A"}))


def test_an_error_in_a_heartbeat_is_a_kind_and_never_text() -> None:
    Heartbeat(replica_id="r", applied_epoch=0, state="failed", last_error="bundle-tampered")
    with pytest.raises(ChangeRequestError) as refusal:
        Heartbeat(replica_id="r", applied_epoch=0, state="failed", last_error="Ann was born in 1")
    assert "Ann" not in str(refusal.value)
    for fields in ({"applied_epoch": -1}, {"state": "well"}, {"replica_id": ""}):
        with pytest.raises(ChangeRequestError):
            Heartbeat(**({"replica_id": "r", "applied_epoch": 0, "state": "failed"} | fields))


def test_http_tells_refusals_apart() -> None:
    statuses = {
        ChangeRequestError: 422,
        EpochConflictError: 412,
        IdempotencyConflictError: 409,
        OperationNotFoundError: 404,
        RegistryUnavailableError: 503,
        RegistryMismatchError: 503,
    }
    assert {error: status_of(error("x")) for error in statuses} == statuses


def test_of_racing_operators_exactly_one_wins_each_epoch(place: Place) -> None:
    rounds, num_operators = 8, 3
    registries = [place.open() for _ in range(num_operators)]
    barrier = threading.Barrier(num_operators)

    def operate(index: int) -> list[int]:
        won = []
        for epoch in range(rounds):
            request = activation("authors", 1 + epoch * num_operators + index)
            barrier.wait(60)
            try:
                appended = registries[index].append(request, expected_epoch=epoch)
            except EpochConflictError:
                pass
            else:
                won.append(appended.change.epoch)
            barrier.wait(60)
        return won

    with ThreadPoolExecutor(num_operators) as pool:
        wins = list(pool.map(operate, range(num_operators)))
    assert sorted(chain.from_iterable(wins)) == list(range(1, rounds + 1))
    assert [c.epoch for c in registries[0].changes_since(0)] == list(range(1, rounds + 1))


def test_the_same_key_from_two_servers_at_once_is_one_operation(place: Place) -> None:
    registries = [place.open(), place.open()]
    for number in range(6):
        with ThreadPoolExecutor(2) as pool:
            appended = list(
                pool.map(
                    lambda registry, n=number: registry.append(
                        activation("authors", 10 + n), idempotency=key(f"k{n}")
                    ),
                    registries,
                )
            )
        assert {a.outcome for a in appended} == {"recorded", "replayed"}
        assert appended[0].change == appended[1].change
    assert registries[0].head() == 6


def test_a_server_with_another_model_or_substrate_is_refused(place: Place) -> None:
    place.open()
    for other in (
        Deployment(base_model_fingerprint="e" * 64, substrate_digest=DEPLOYMENT.substrate_digest),
        Deployment(base_model_fingerprint="f" * 64, substrate_digest=digest(6)),
    ):
        with pytest.raises(RegistryMismatchError, match="another base model or substrate"):
            place.open(other)
    place.open()


def test_servers_that_found_a_registry_at_once_agree_on_one_deployment(place: Place) -> None:
    others = [
        Deployment(base_model_fingerprint=letter * 64, substrate_digest=digest(6))
        for letter in "abcd"
    ]

    def found(deployment: Deployment) -> bool:
        try:
            place.open(deployment)
        except RegistryMismatchError:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(found, others)) == 1


def test_a_lease_is_for_serving_servers_at_the_head(registry: Registry) -> None:
    assert registry.heartbeat(beat(state="starting")).duration_s == 0
    assert not registry.replicas()[0].holds_lease
    lease = registry.heartbeat(beat())
    assert (lease.head, lease.duration_s) == (0, LEASE_S)
    registry.append(activation())
    assert registry.barrier(1).lagging[0].replica_id == "r1"
    late = registry.heartbeat(beat("r2"))
    assert (late.head, late.duration_s) == (1, 0)
    assert [r.replica_id for r in registry.barrier(1).lagging] == ["r1"]
    assert registry.heartbeat(beat(applied_epoch=1)).duration_s == LEASE_S
    assert registry.barrier(1).is_passed
    with pytest.raises(EpochConflictError):
        registry.barrier(2)


def test_the_barrier_waits_for_a_silent_server_until_its_lease_is_over(
    place: Place, registry: Registry
) -> None:
    registry.heartbeat(beat())
    place.advance(4)
    registry.append(activation())
    place.advance(LEASE_S - 4 + MARGIN_S - 0.5)
    assert not registry.barrier(1).is_passed
    place.advance(1)
    assert registry.barrier(1).is_passed
    # Coming back, it gets no lease that would break what was promised.
    assert registry.heartbeat(beat()).duration_s == 0
    assert registry.barrier(1).is_passed


def test_a_lease_that_has_run_out_comes_back_only_at_the_head(
    place: Place, registry: Registry
) -> None:
    registry.heartbeat(beat())
    # Over for its holder, though not yet for those who wait for it.
    place.advance(LEASE_S + MARGIN_S / 2)
    registry.append(activation())
    assert not registry.barrier(1).is_passed
    assert registry.heartbeat(beat()).duration_s == 0
    place.advance(MARGIN_S)
    assert registry.barrier(1).is_passed
    assert registry.heartbeat(beat()).duration_s == 0
    assert registry.barrier(1).is_passed
    assert registry.heartbeat(beat(applied_epoch=1)).duration_s == LEASE_S


def test_a_server_that_hangs_but_reports_cannot_hold_up_a_change(
    place: Place, registry: Registry
) -> None:
    registry.heartbeat(beat())
    place.advance(LEASE_S / 2)
    registry.append(activation())
    place.advance(1)
    registry.append(activation("books", 2))
    # The first change that it lacks counts, not the last.
    assert registry.heartbeat(beat()).duration_s == pytest.approx(LEASE_S - 1, abs=0.5)
    place.advance(LEASE_S - 2)
    assert 0 < registry.heartbeat(beat()).duration_s <= 1
    assert not registry.barrier(1).is_passed
    place.advance(1)
    assert registry.heartbeat(beat()).duration_s == 0
    assert not registry.barrier(1).is_passed
    place.advance(MARGIN_S)
    assert registry.barrier(1).is_passed


def test_a_server_that_has_stopped_gives_up_its_lease(registry: Registry) -> None:
    registry.heartbeat(beat("r1"))
    registry.heartbeat(beat("r2"))
    registry.append(activation())
    failed = Heartbeat(replica_id="r1", applied_epoch=0, state="failed", last_error="switch")
    assert registry.heartbeat(failed).duration_s == 0
    assert [r.replica_id for r in registry.barrier(1).lagging] == ["r2"]
    assert registry.replicas()[0].last_error == "switch"
    registry.release("r2")
    registry.release("never-heard-of")
    assert registry.barrier(1).is_passed
    assert [r.replica_id for r in registry.replicas()] == ["r1"]


def test_a_server_ahead_of_the_log_is_refused(registry: Registry) -> None:
    registry.append(activation())
    with pytest.raises(RegistryMismatchError, match="lost changes"):
        registry.heartbeat(beat(applied_epoch=2))
    assert registry.replicas() == ()


def test_servers_that_are_gone_for_long_are_forgotten(place: Place, registry: Registry) -> None:
    registry.heartbeat(beat("old"))
    place.advance(REPLICA_MEMORY.total_seconds() + 1)
    registry.heartbeat(beat("new"))
    assert [r.replica_id for r in registry.replicas()] == ["new"]


def test_a_heartbeat_and_an_append_exclude_each_other(postgresql: Place) -> None:
    impatient, other = postgresql.open(timeout_s=1.0), postgresql.open()
    with other._database.write() as session:
        other._lock(session, is_exclusive=False)
        impatient.heartbeat(beat())
        for blocked in (lambda: impatient.append(activation()), lambda: impatient.barrier(0)):
            with pytest.raises(RegistryUnavailableError, match=r"LockNotAvailable|QueryCanceled"):
                blocked()
    with other._database.write() as session:
        other._lock(session, is_exclusive=True)
        with pytest.raises(RegistryUnavailableError):
            impatient.heartbeat(beat())
    assert impatient.append(activation()).change.epoch == 1


def test_heartbeats_that_overlap_do_not_keep_a_change_out(postgresql: Place) -> None:
    patient, others = postgresql.open(timeout_s=20.0), [postgresql.open() for _ in range(2)]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(others[0]._database.write())
        others[0]._lock(first, is_exclusive=False)
        with ThreadPoolExecutor(2) as pool:
            change = pool.submit(patient.append, activation())
            _wait_for_a_waiting_backend(postgresql, 1)
            later = pool.submit(others[1].heartbeat, beat())
            _wait_for_a_waiting_backend(postgresql, 2)
            assert not later.done()
            stack.close()
            assert change.result(20).change.epoch == 1
            assert later.result(20).head == 1


def _wait_for_a_waiting_backend(place: Place, count: int) -> None:
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with psycopg.connect(place.url, autocommit=True) as connection:
        deadline = time.monotonic() + 20
        while connection.execute(f"{query} AND datname = current_database()").fetchone() != (
            count,
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_registry_that_does_not_answer_says_so_in_time(place: Place, registry: Registry) -> None:
    impatient = place.open(timeout_s=1.0)
    with registry._database.write() as session:
        registry._lock(session, is_exclusive=True)
        with pytest.raises(RegistryUnavailableError) as failure:
            impatient.append(activation(reason="case 7"))
    assert "case 7" not in str(failure.value)
    assert "case 7" not in str(failure.value.__cause__)
    assert impatient.head() == 0


def test_times_that_make_no_sense_are_refused(place: Place) -> None:
    for option in ("lease_s", "clock_margin_s", "poll_s", "timeout_s"):
        with pytest.raises(ConfigError):
            place.open(**{option: 0.0})


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_listening_yields_every_rise_of_the_head(place: Place, run: Callable[..., Any]) -> None:
    # PostgreSQL notifies, so that it needs no look in between; SQLite is looked at.
    poll_s = 30.0 if place.is_postgresql else 0.02
    listening, acting = place.open(poll_s=poll_s), place.open()
    acting.append(activation("authors", 1))

    async def listen() -> list[int]:
        heads = []
        async with aclosing(listening.listen(after=0)) as changes, asyncio.timeout(20):
            async for head in changes:
                heads.append(head)
                if head == 4:
                    return heads
                request = activation("authors", head + 1)
                asyncio.get_running_loop().call_later(
                    0.1,
                    lambda r=request: asyncio.ensure_future(asyncio.to_thread(acting.append, r)),
                )
        return heads

    assert run(listen()) == [1, 2, 3, 4]


def test_listening_outlives_a_cut_connection_and_a_lost_notification(postgresql: Place) -> None:
    listening, acting = postgresql.open(poll_s=0.2), postgresql.open()

    async def listen() -> int:
        async with aclosing(listening.listen(after=0)) as changes, asyncio.timeout(30):
            waiting = asyncio.ensure_future(anext(changes))
            await asyncio.sleep(0.3)
            await asyncio.to_thread(cut)
            await asyncio.to_thread(acting.append, activation())
            return await waiting

    def cut() -> None:
        with psycopg.connect(postgresql.url, autocommit=True) as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )

    assert asyncio.run(listen()) == 1


def test_what_was_acknowledged_outlives_a_killed_process(place: Place) -> None:
    script = """
        import sys
        from server.registry import Registry
        from tests.server.registry.conftest import DEPLOYMENT, activation
        registry = Registry.open(sys.argv[1], DEPLOYMENT, max_domains=3)
        for number in range(10**6):
            appended = registry.append(activation("authors", number))
            print(appended.change.epoch, appended.change.operation_id, flush=True)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), place.url],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    acknowledged = [process.stdout.readline().split() for _ in range(25)]
    process.kill()
    rest = process.stdout.read()
    acknowledged += [line.split() for line in rest.splitlines() if rest.endswith("\n")]
    process.stdout.close()
    process.wait()
    changes = place.open().changes_since(0)
    assert [c.epoch for c in changes] == list(range(1, len(changes) + 1))
    log = {str(c.epoch): c.operation_id for c in changes}
    assert all(log[epoch] == operation for epoch, operation in acknowledged)
    assert len(changes) <= len(acknowledged) + 1
