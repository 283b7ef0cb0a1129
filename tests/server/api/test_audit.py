"""What of the domain service and of /admin is in the audit log, and what happens if it cannot be."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from alter_core.errors import (
    AuditError,
    BundleNotFoundError,
    CanaryError,
    DomainConflictError,
    DomainNameError,
    EngineError,
    SwitchError,
)
from alter_core.substrate import Substrate
from server.audit import AuditEntry, AuditLog, AuditRecord, Cause
from server.engine.base import CanaryReport
from server.tokens import TokenStore
from tests.support.tiny import TinyBundles

from .conftest import Replica, Site, Stack
from .test_admin import URL, body, is_problem

CAUSE = Cause(actor="alice", request_id="q1", reason="case 12/26")
Unit = Callable[[Replica], Awaitable[None]]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.sqlite"


@pytest.fixture
def log(path: Path) -> AuditLog:
    return AuditLog.open(path)


@pytest.fixture
def with_server(site: Site, log: AuditLog) -> Callable[..., None]:
    """Runs a coroutine function over a server that has started."""

    def run(test: Unit, domains: Mapping[str, Path] | None = None) -> None:
        async def running() -> None:
            server = site.replica(audit_log=log)
            await server.parts.start(domains or {})
            await test(server)
            await server.reconciler.stop()

        asyncio.run(running())

    return run


async def no_more(server: Replica) -> None:
    """For what the start alone does."""


def told(log: AuditLog, *fields: str) -> list[tuple[Any, ...]]:
    """Those fields of all records of an unbroken log."""
    log.verify()
    return [tuple(getattr(record, field) for field in fields) for record in log.records()]


def epochs(log: AuditLog) -> list[tuple[Any, ...]]:
    return told(log, "action", "outcome", "epoch_before", "epoch_after")


def refuse_writes(path: Path, *, outcomes: str) -> None:
    """As a full disk would, for records whose outcome matches."""
    connection = sqlite3.connect(path)
    connection.execute(
        "CREATE TRIGGER full BEFORE INSERT ON audit_records "
        f"WHEN NEW.outcome {outcomes} BEGIN SELECT RAISE(ABORT, 'disk is full'); END"
    )
    connection.commit()
    connection.close()


def allow_writes(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("DROP TRIGGER full")
    connection.commit()
    connection.close()


def test_every_change_is_recorded_before_and_after_and_where_it_was_applied(
    with_server: Any, log: AuditLog, bundles: TinyBundles
) -> None:
    digests = []

    async def test(server: Replica) -> None:
        for index in (0, 0, 1):
            bundle = bundles.experts[f"domain-{index}"]
            done = await server.activate("a", bundle, cause=CAUSE)
            digests.append(done.change.bundle_digest)
        await server.revoke("a", cause=CAUSE)

    with_server(test)
    asked = [r for r in log.records() if r.action in ("activate", "revoke")]
    assert [(r.action, r.outcome, r.epoch_before, r.epoch_after) for r in asked] == [
        ("activate", "begun", 0, None),
        ("activate", "created", 0, 1),
        ("activate", "unchanged", 1, 1),
        ("activate", "begun", 1, None),
        ("activate", "replaced", 1, 2),
        ("revoke", "begun", 2, None),
        ("revoke", "revoked", 2, 3),
    ]
    first, _, second = digests
    assert [r.digest for r in asked] == [first] * 3 + [second] * 4
    applied = [r for r in log.records() if r.action == "apply"]
    assert [(r.outcome, r.epoch_before, r.epoch_after, r.digest) for r in applied] == [
        ("done", 0, 1, first),
        ("done", 1, 2, second),
        ("done", 2, 3, None),
    ]
    for record in (*asked, *applied):
        assert (record.actor, record.request_id, record.reason) == ("alice", "q1", "case 12/26")
        assert (record.domain, record.error) == ("a", None)
    log.verify()


def test_a_start_and_its_domains_are_recorded(
    with_server: Any, log: AuditLog, substrate: Substrate, bundles: TinyBundles
) -> None:
    domains = {"a": bundles.experts["domain-0"]}
    with_server(no_more, domains)
    assert epochs(log) == [
        ("start", "begun", None, None),
        ("start", "done", None, None),
        ("activate", "begun", 0, None),
        ("activate", "created", 0, 1),
        ("apply", "done", 0, 1),
    ]
    assert {actor for (actor,) in told(log, "actor")} == {"server"}
    assert {d for (d,) in told(log, "digest")[:2]} == {substrate.digest}
    with_server(no_more, domains)
    assert epochs(log)[5:] == [
        ("start", "begun", None, None),
        ("start", "done", None, None),
        ("activate", "unchanged", 1, 1),
        ("apply", "done", 0, 1),
    ]


def test_a_failed_start_is_recorded(site: Site, log: AuditLog) -> None:
    async def fail() -> CanaryReport:
        raise CanaryError("no change")

    async def run() -> None:
        server = site.replica(audit_log=log)
        server.engine.run_canary = fail  # type: ignore[method-assign]
        with pytest.raises(CanaryError):
            await server.parts.start({})

    asyncio.run(run())
    assert told(log, "outcome", "error") == [("begun", None), ("failed", "canary")]


def test_the_record_stands_before_the_change_is_in_the_registry(
    with_server: Any, log: AuditLog, bundles: TinyBundles
) -> None:
    async def test(server: Replica) -> None:
        heads = []
        append = log.append

        def looking(entry: AuditEntry, **options: Any) -> AuditRecord:
            if entry.action == "activate":
                heads.append((entry.outcome, server.parts.registry.head()))
            return append(entry, **options)

        log.append = looking  # type: ignore[method-assign]
        await server.activate("a", bundles.experts["domain-0"])
        assert heads == [("begun", 0), ("created", 1)]

    with_server(test)


def test_refusals_are_recorded_with_the_kind_of_their_error(
    with_server: Any, log: AuditLog, bundles: TinyBundles, tmp_path: Path
) -> None:
    async def test(server: Replica) -> None:
        await server.activate("a", bundles.experts["domain-0"])
        with pytest.raises(DomainConflictError):
            await server.activate("b", bundles.experts["domain-0"], cause=CAUSE)
        with pytest.raises(BundleNotFoundError):
            await server.activate("b", tmp_path / "Kulnai Dredrirn", cause=CAUSE)
        with pytest.raises(DomainNameError):
            await server.activate("Kulnai Dredrirn", bundles.experts["domain-0"], cause=CAUSE)

    with_server(test)
    assert told(log, "domain", "outcome", "error", "epoch_before", "epoch_after")[-3:] == [
        ("b", "refused", "domain-conflict", 1, 1),
        ("b", "refused", "bundle-not-found", 1, 1),
        (None, "refused", "domain-name", 1, 1),
    ]
    assert "Kulnai" not in "".join(record.json() for record in log.records())


@pytest.mark.parametrize(
    ("failure", "kind", "epoch_after"),
    [
        (SwitchError("no copy"), "switch", 0),
        (EngineError("undone"), "engine", None),
        (RuntimeError("Kulnai Dredrirn"), "internal", None),
    ],
)
def test_a_change_that_cannot_be_applied_is_recorded_once(
    with_server: Any,
    log: AuditLog,
    bundles: TinyBundles,
    failure: Exception,
    kind: str,
    epoch_after: int | None,
) -> None:
    async def test(server: Replica) -> None:
        server.engine.failure = failure
        asked = await server.operations.activate("a", bundles.experts["domain-0"])
        await server.until(lambda: len(server.engine.switches) > 1 or not server.service.is_trusted)
        await server.until(lambda: server.reconciler.error is not None)
        await server.reconciler._catch_up()  # it is tried again
        looked = await server.operations.get(asked.change.operation_id)
        assert looked.change == asked.change

    with_server(test)
    records = [r for r in log.records() if r.action == "apply"]
    assert [(r.outcome, r.error, r.epoch_after) for r in records] == [("failed", kind, epoch_after)]
    assert "Kulnai" not in "".join(record.json() for record in log.records())


def test_a_change_that_cannot_be_recorded_is_refused_and_changes_nothing(
    with_server: Any, log: AuditLog, path: Path, bundles: TinyBundles
) -> None:
    async def test(server: Replica) -> None:
        await server.activate("a", bundles.experts["domain-0"])
        num_switches, num_records = len(server.engine.switches), len(epochs(log))
        refuse_writes(path, outcomes="IS NOT NULL")
        for attempt in (
            server.activate("b", bundles.experts["domain-1"]),
            server.activate("a", bundles.experts["domain-1"]),
            server.activate("a", bundles.experts["domain-0"]),
            server.revoke("a"),
            server.revoke("nothing"),
        ):
            with pytest.raises(AuditError, match="disk is full"):
                await attempt
        assert (server.parts.registry.head(), len(server.engine.switches)) == (1, num_switches)
        assert [d.name for d in server.service.list()] == ["a"]
        assert server.reconciler.is_ready
        allow_writes(path)
        assert (await server.revoke("a")).epoch == 2
        assert len(epochs(log)) == num_records + 3

    with_server(test)


def test_an_outcome_that_cannot_be_recorded_is_told_and_made_up_for(
    with_server: Any, log: AuditLog, path: Path, bundles: TinyBundles
) -> None:
    async def test(server: Replica) -> None:
        refuse_writes(path, outcomes="= 'created'")
        with pytest.raises(AuditError, match=r"came to an end \(created, epoch 1\)"):
            await server.activate("a", bundles.experts["domain-0"])
        await server.until(lambda: server.service.epoch == 1)
        with pytest.raises(AuditError, match="disk is full"):
            await server.revoke("a")
        assert server.parts.registry.head() == 1
        allow_writes(path)
        await server.revoke("a")

    with_server(test)
    assert [r for r in epochs(log) if r[0] in ("activate", "revoke")] == [
        ("activate", "begun", 0, None),
        ("activate", "created", 0, 1),
        ("revoke", "begun", 1, None),
        ("revoke", "revoked", 1, 2),
    ]
    assert ("apply", "done", 0, 1) in epochs(log)


def test_a_server_that_cannot_record_its_start_does_not_start(
    site: Site, log: AuditLog, path: Path
) -> None:
    async def run() -> None:
        server = site.replica(audit_log=log)
        path.unlink()
        with pytest.raises(AuditError):
            await server.parts.start({})
        assert not server.service.is_sound

    asyncio.run(run())


Test = Callable[[Stack, httpx.AsyncClient], Awaitable[None]]


@pytest.fixture
def tokens(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path / "tokens.json")


@pytest.fixture
def over_http(
    make_stack: Callable[..., Any], log: AuditLog, tokens: TokenStore
) -> Callable[[Test], None]:
    def run(test: Test) -> None:
        async def running() -> None:
            stack = await make_stack(audit_log=log, tokens=tokens)
            async with stack.client() as client:
                await test(stack, client)

        asyncio.run(running())

    return run


def requested(log: AuditLog) -> list[AuditRecord]:
    """The records behind those of the start, without what was applied."""
    log.verify()
    return [record for record in log.records() if record.action in ("activate", "revoke")]


def test_actor_request_id_and_reason_come_from_the_request(
    over_http: Any, log: AuditLog, tokens: TokenStore, bundles: TinyBundles
) -> None:
    alice = {"Authorization": f"Bearer {tokens.create('alice', 'operator')}"}

    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        created = await client.post(
            URL,
            json=body(bundles, 0, reason="Az. 3 O 12/26 – §17"),
            headers=alice | {"X-Request-Id": "req-7"},
        )
        assert created.status_code == 201
        assert created.headers["x-request-id"] == "req-7"
        revoked = await client.delete(f"{URL}/a", headers={"X-Alter-Reason": "Az.%203%20%C2%A717"})
        assert revoked.status_code == 200
        first, second, third, fourth = requested(log)
        assert first.digest == created.json()["digest"]
        for record in (first, second):
            assert (record.actor, record.request_id) == ("alice", "req-7")
            assert record.reason == "Az. 3 O 12/26 – §17"
        for record in (third, fourth):
            assert record.actor == "admin"
            assert record.request_id == revoked.headers["x-request-id"]
            assert record.reason == "Az. 3 §17"

    over_http(test)


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "a%0ab"])
def test_an_unusable_request_id_is_replaced(over_http: Any, given: str) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        response = await client.get(URL, headers={"X-Request-Id": given})
        assert len(response.headers["x-request-id"]) == 36

    over_http(test)


def test_what_never_gets_to_the_service_is_recorded_too(
    over_http: Any, log: AuditLog, tokens: TokenStore, bundles: TinyBundles
) -> None:
    viewer = {"Authorization": f"Bearer {tokens.create('bob', 'viewer')}"}
    json_type = {"content-type": "application/json"}

    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        await client.post(URL, json=body(bundles, 0), headers=viewer)
        await client.delete(f"{URL}/a", headers=viewer)
        await client.delete(f"{URL}/Kulnai%20Dredrirn", headers=viewer)
        await client.post(URL, content=b"{", headers=json_type)
        await client.post(URL, json=body(bundles, 0, more="Kulnai Dredrirn"))
        await client.post(URL, json={"name": "a", "bundle": "Kulnai Dredrirn"})
        await client.delete(f"{URL}/a", headers={"If-Match": "junk"})
        await client.delete(f"{URL}/a", headers={"X-Alter-Reason": "a%0Ab"})
        await client.delete(f"{URL}/a")
        await client.post(URL, json=body(bundles, 0), headers={"If-Match": '"7"'})
        assert [(r.actor, r.action, r.domain, r.error) for r in requested(log)] == [
            ("bob", "activate", None, "role-too-low"),
            ("bob", "revoke", "a", "role-too-low"),
            ("bob", "revoke", None, "role-too-low"),
            ("admin", "activate", None, "malformed-json"),
            ("admin", "activate", None, "invalid-request"),
            ("admin", "activate", None, "bundle-not-found"),
            ("admin", "revoke", "a", "malformed-header"),
            ("admin", "revoke", "a", "malformed-header"),
            ("admin", "revoke", "a", "domain-not-found"),
            ("admin", "activate", "a", "precondition-failed"),
        ]
        assert {r.outcome for r in requested(log)} == {"refused"}
        assert "Kulnai" not in "".join(r.json() for r in log.records())

    over_http(test)


def test_reading_and_strangers_leave_no_record(over_http: Any, log: AuditLog) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        await client.get(URL)
        await client.get(f"{URL}/a")
        await client.post("/admin/nothing", json={})
        await client.put(URL, json={})
        await client.post(URL, json={}, headers={"Authorization": "Bearer wrong"})
        assert requested(log) == []

    over_http(test)


def test_a_replay_is_recorded_once(over_http: Any, log: AuditLog, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        key = {"Idempotency-Key": "k"}
        for _ in range(3):
            assert (await client.post(URL, json=body(bundles, 0), headers=key)).is_success
        await client.post(URL, json=body(bundles, 1), headers=key)
        assert [r.error or r.outcome for r in requested(log)] == [
            "begun", "created", "idempotency-conflict",
        ]  # fmt: skip

    over_http(test)


@pytest.mark.parametrize("reason", ["", "a\nb", "x" * 201, "\u202eb", 7])
def test_a_reason_that_cannot_stand_in_the_log_is_refused(
    over_http: Any, log: AuditLog, bundles: TinyBundles, reason: Any
) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        refused = await client.post(URL, json=body(bundles, 0, reason=reason))
        problem = is_problem(refused, 422, "invalid-request")
        assert problem["errors"][0]["location"] == "body.reason"
        assert stack.service.epoch == 0
        assert [r.reason for r in requested(log)] == [None]

    over_http(test)


@pytest.mark.parametrize("reason", [b"", b"a%0Ab", b"%ff", b"\xe9", b"x" * 201, b"%E2%80%AE"])
def test_a_reason_in_a_header_is_judged_alike(
    over_http: Any, bundles: TinyBundles, reason: bytes
) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        await client.post(URL, json=body(bundles, 0))
        headers = [(b"x-alter-reason", reason)]
        refused = await client.delete(f"{URL}/a", headers=headers)
        is_problem(refused, 400, "malformed-header")
        assert stack.service.epoch == 1

    over_http(test)


def test_without_a_log_that_can_be_written_every_change_is_503(
    over_http: Any, path: Path, bundles: TinyBundles
) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        await client.post(URL, json=body(bundles, 0))
        shutil.move(path, path.with_name("away"))
        for answer in (
            await client.post(URL, json=body(bundles, 1)),
            await client.post(URL, content=b"{", headers={"content-type": "application/json"}),
            await client.post(URL, json={}),
            await client.delete(f"{URL}/a"),
            await client.delete(f"{URL}/a", headers={"If-Match": "junk"}),
        ):
            is_problem(answer, 503, "audit")
            assert answer.headers["x-request-id"]
        assert stack.service.epoch == 1
        assert (await client.get(f"{URL}/a")).status_code == 200
        shutil.move(path.with_name("away"), path)
        assert (await client.delete(f"{URL}/a")).status_code == 200

    over_http(test)
