"""What of the domain service and of /admin is in the audit log, and what happens if it cannot be."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Awaitable, Callable
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
from server.audit import AuditLog, AuditRecord, Cause
from server.domains import DomainService
from server.engine.base import CanaryReport
from server.tokens import TokenStore
from tests.support.tiny import TinyBundles

from .conftest import MAX_DOMAINS, InMemoryEngine, Stack
from .test_admin import URL, body, is_problem

CAUSE = Cause(actor="alice", request_id="q1", reason="case 12/26")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.sqlite"


@pytest.fixture
def log(path: Path) -> AuditLog:
    return AuditLog.open(path)


@pytest.fixture
def engine() -> InMemoryEngine:
    return InMemoryEngine(MAX_DOMAINS)


@pytest.fixture
def service(engine: InMemoryEngine, substrate: Substrate, log: AuditLog) -> DomainService:
    return DomainService(engine, substrate, MAX_DOMAINS, audit_log=log)


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


def test_every_change_has_two_records_with_epochs_and_digest(
    service: DomainService, log: AuditLog, bundles: TinyBundles
) -> None:
    async def run() -> tuple[str, str]:
        first = await service.activate("a", bundles.experts["domain-0"], cause=CAUSE)
        await service.activate("a", bundles.experts["domain-0"], cause=CAUSE)
        second = await service.activate("a", bundles.experts["domain-1"], cause=CAUSE)
        await service.revoke("a", cause=CAUSE)
        return first.domain.digest, second.domain.digest

    first, second = asyncio.run(run())
    assert epochs(log) == [
        ("activate", "begun", 0, None),
        ("activate", "created", 0, 1),
        ("activate", "unchanged", 1, 1),
        ("activate", "begun", 1, None),
        ("activate", "replaced", 1, 2),
        ("revoke", "begun", 2, None),
        ("revoke", "revoked", 2, 3),
    ]
    assert [d for (d,) in told(log, "digest")] == [first] * 3 + [second] * 4
    assert set(told(log, "actor", "request_id", "reason", "domain", "error")) == {
        ("alice", "q1", "case 12/26", "a", None)
    }


def test_changes_that_wait_for_their_turn_begin_at_the_epoch_they_find(
    service: DomainService, log: AuditLog, bundles: TinyBundles
) -> None:
    async def run() -> None:
        await asyncio.gather(
            *(service.activate(f"d{i}", bundles.experts[f"domain-{i}"]) for i in range(MAX_DOMAINS))
        )

    asyncio.run(run())
    assert epochs(log) == [
        record
        for epoch in range(MAX_DOMAINS)
        for record in (
            ("activate", "begun", epoch, None),
            ("activate", "created", epoch, epoch + 1),
        )
    ]


def test_a_start_and_its_domains_are_recorded(
    service: DomainService, log: AuditLog, substrate: Substrate, bundles: TinyBundles
) -> None:
    asyncio.run(service.start({"a": bundles.experts["domain-0"]}))
    assert epochs(log) == [
        ("start", "begun", 0, None),
        ("activate", "begun", 0, None),
        ("activate", "created", 0, 1),
        ("start", "done", 0, 1),
    ]
    assert len(set(told(log, "actor", "request_id"))) == 1
    records = list(log.records())
    assert records[0].actor == "server"
    assert records[0].digest == records[3].digest == substrate.digest


def test_a_failed_start_is_recorded(
    service: DomainService, engine: InMemoryEngine, log: AuditLog
) -> None:
    async def fail() -> CanaryReport:
        raise CanaryError("no change")

    engine.run_canary = fail  # type: ignore[method-assign]
    with pytest.raises(CanaryError):
        asyncio.run(service.start({}))
    assert told(log, "outcome", "error") == [("begun", None), ("failed", "canary")]


def test_the_record_stands_before_the_engine_is_asked(
    service: DomainService, engine: InMemoryEngine, log: AuditLog, bundles: TinyBundles
) -> None:
    async def run() -> None:
        engine.gate = asyncio.Event()
        caller = asyncio.create_task(service.activate("a", bundles.experts["domain-0"]))
        while not engine.switches:
            await asyncio.sleep(0.01)
        assert epochs(log) == [("activate", "begun", 0, None)]
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        engine.gate.set()
        while service.status().num_pending:
            await asyncio.sleep(0.01)
        assert epochs(log)[1:] == [("activate", "created", 0, 1)]

    asyncio.run(run())


def test_refusals_are_recorded_with_the_kind_of_their_error(
    service: DomainService, log: AuditLog, bundles: TinyBundles, tmp_path: Path
) -> None:
    async def run() -> None:
        await service.activate("a", bundles.experts["domain-0"])
        with pytest.raises(DomainConflictError):
            await service.activate("b", bundles.experts["domain-0"], cause=CAUSE)
        with pytest.raises(BundleNotFoundError):
            await service.activate("b", tmp_path / "Kulnai Dredrirn", cause=CAUSE)
        with pytest.raises(DomainNameError):
            await service.activate("Kulnai Dredrirn", bundles.experts["domain-0"], cause=CAUSE)

    asyncio.run(run())
    assert told(log, "domain", "outcome", "error", "epoch_before", "epoch_after")[2:] == [
        ("b", "refused", "domain-conflict", 1, 1),
        ("b", "refused", "bundle-not-found", 1, 1),
        (None, "refused", "domain-name", 1, 1),
    ]
    assert "Kulnai" not in "".join(record.json() for record in log.records())


@pytest.mark.parametrize(
    ("failure", "kind", "epoch_after"),
    [(SwitchError("no copy"), "switch", 0), (EngineError("undone"), "engine", None)],
)
def test_a_failed_switch_is_recorded_with_what_is_known(
    service: DomainService,
    engine: InMemoryEngine,
    log: AuditLog,
    bundles: TinyBundles,
    failure: Exception,
    kind: str,
    epoch_after: int | None,
) -> None:
    engine.failure = failure
    with pytest.raises(type(failure)):
        asyncio.run(service.activate("a", bundles.experts["domain-0"]))
    assert told(log, "outcome", "error", "epoch_after") == [
        ("begun", None, None),
        ("failed", kind, epoch_after),
    ]


def test_no_text_of_an_unexpected_error_is_recorded(
    service: DomainService, engine: InMemoryEngine, log: AuditLog, bundles: TinyBundles
) -> None:
    engine.failure = RuntimeError("Kulnai Dredrirn")
    with pytest.raises(RuntimeError):
        asyncio.run(service.activate("a", bundles.experts["domain-0"]))
    assert told(log, "error") == [(None,), ("internal",)]


def test_a_change_that_cannot_be_recorded_is_refused_and_changes_nothing(
    service: DomainService,
    engine: InMemoryEngine,
    log: AuditLog,
    path: Path,
    bundles: TinyBundles,
) -> None:
    async def run() -> None:
        await service.activate("a", bundles.experts["domain-0"])
        num_switches = len(engine.switches)
        refuse_writes(path, outcomes="IS NOT NULL")
        for attempt in (
            service.activate("b", bundles.experts["domain-1"]),
            service.activate("a", bundles.experts["domain-1"]),
            service.activate("a", bundles.experts["domain-0"]),
            service.revoke("a"),
            service.revoke("nothing"),
        ):
            with pytest.raises(AuditError, match="disk is full"):
                await attempt
        assert (service.epoch, len(engine.switches)) == (1, num_switches)
        assert [d.name for d in service.list()] == ["a"]
        assert service.is_trusted
        allow_writes(path)
        assert (await service.revoke("a")).report.epoch == 2
        assert len(epochs(log)) == 4

    asyncio.run(run())


def test_an_outcome_that_cannot_be_recorded_is_told_and_made_up_for(
    service: DomainService, log: AuditLog, path: Path, bundles: TinyBundles
) -> None:
    async def run() -> None:
        refuse_writes(path, outcomes="= 'created'")
        with pytest.raises(AuditError, match=r"came to an end \(created, epoch 1\)"):
            await service.activate("a", bundles.experts["domain-0"])
        assert (service.epoch, service.is_trusted) == (1, True)
        with pytest.raises(AuditError, match="disk is full"):
            await service.revoke("a")
        assert service.epoch == 1
        allow_writes(path)
        await service.revoke("a")

    asyncio.run(run())
    assert epochs(log) == [
        ("activate", "begun", 0, None),
        ("activate", "created", 0, 1),
        ("revoke", "begun", 1, None),
        ("revoke", "revoked", 1, 2),
    ]


def test_a_server_that_cannot_record_its_start_does_not_start(
    service: DomainService, path: Path
) -> None:
    path.unlink()
    with pytest.raises(AuditError):
        asyncio.run(service.start({}))
    assert not service.is_serving


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
    """The records behind those of the start."""
    log.verify()
    return list(log.records())[2:]


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
            "begun", "created", "idempotency-key-reused",
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
