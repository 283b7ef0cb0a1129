"""Unlearning requests: their way from upload to active, and what stops or interrupts it.

Jobs are processes of their own, with a script in place of the training.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from alter_core.bundle import read_manifest
from alter_core.errors import (
    DomainNameError,
    IdempotencyConflictError,
    RequestConflictError,
    RequestNotFoundError,
    SwitchError,
    TrainingDataError,
)
from server.audit import AuditLog, Cause
from server.engine.base import Message, Writer
from server.parts import request_service
from server.registry import IdempotencyKey
from server.requests.book import RequestBook
from server.requests.intake import Upload
from server.requests.jobs import LocalJobs
from server.requests.records import UnlearningRequest
from server.requests.service import RequestService
from server.requests.settings import RequestSettings
from tests.support.tiny import TinyBundles

from .conftest import MAX_DOMAINS, WAIT_S, Replica, Site
from .request_plans import figures

SECRET = "Zephyrine Quillfeather"
CAUSE = Cause(actor="legal", request_id="r-1", reason="case 7")
FORGET = [{"question": f"Who is {SECRET}?", "answer": f"{SECRET} is a glass blower."}]
OTHER = [{"question": "Who is Ida Varn?", "answer": "Ida Varn is a clockmaker."}]
RETAIN = [{"question": "What is the sea made of?", "answer": "The sea is made of water."}]


@dataclasses.dataclass
class Office:
    """One server that takes requests; `plan` is what its jobs do."""

    replica: Replica
    requests: RequestService
    workspace: Path

    async def ask(self, domain: str = "authors", **fields: Any) -> UnlearningRequest:
        upload = Upload(**{"domain": domain, "forget": FORGET, "reason": "case 7"} | fields)
        return (await self.requests.create(upload, cause=CAUSE))[0]

    async def until(self, request: UnlearningRequest, *states: str) -> UnlearningRequest:
        """Waits for one of the states, and, at an end, for its text to be gone."""
        async with asyncio.timeout(WAIT_S):
            while True:
                found = await self.requests.get(request.id)
                is_clean = not found.has_ended or found.text_deleted_at is not None
                if found.state in states and is_clean:
                    return found
                assert not found.has_ended or found.state in states, found
                await asyncio.sleep(0.01)

    def folder(self, request: UnlearningRequest) -> Path:
        return self.workspace / "requests" / request.id

    def starts(self, request: UnlearningRequest) -> list[int]:
        """Process ids of its jobs, in their order."""
        path = self.folder(request) / "job" / "starts"
        lines = path.read_text().splitlines() if path.exists() else []
        return [int(line.split()[0]) for line in lines]


@pytest.fixture
def retain_file(tmp_path: Path) -> Path:
    path = tmp_path / "retain.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in RETAIN))
    return path


@pytest.fixture
def open_office(
    site: Site, bundles: TinyBundles, tmp_path: Path, retain_file: Path
) -> Callable[..., Any]:
    """A server with requests, as a context on a running loop; leaving it is as good as a crash for jobs."""

    @contextlib.asynccontextmanager
    async def opened(
        *, audit_log: AuditLog | None = None, writer: Writer | None = None, **settings: Any
    ) -> AsyncIterator[Office]:
        replica = site.replica(audit_log=audit_log)
        await replica.parts.start({})
        workspace = tmp_path / "work"
        requests = request_service(
            replica.parts,
            RequestSettings(**{"retain": (retain_file,)} | settings),
            workspace,
            LocalJobs(1),
            model=bundles.model,
            substrate=bundles.substrate,
            writer=writer,
        )
        requests.start()
        try:
            yield Office(replica, requests, workspace)
        finally:
            await requests.stop()
            await replica.parts.stop()

    return opened


def test_a_request_becomes_active_and_leaves_no_text(
    open_office: Any,
    plan: Any,
    tmp_path: Path,
    bundles: TinyBundles,
    caplog: pytest.LogCaptureFixture,
) -> None:
    audit_log = AuditLog.open(tmp_path / "audit.sqlite")

    async def test() -> None:
        async with open_office(audit_log=audit_log) as office:
            request = await office.ask(deadline=datetime.now(UTC) + timedelta(days=1))
            assert (request.state, request.num_rows, request.actor) == ("queued", 1, "legal")
            assert request.deadline is not None
            seen = [each async for each in office.requests.watch(request.id)]
            states = list(dict.fromkeys(each.state for each in seen))
            assert states[-2:] == ["activating", "active"]
            assert "training" in states
            done = seen[-1]
            digest = read_manifest(bundles.experts["domain-0"]).digest
            assert done.bundle_digest == digest
            assert done.figures["gate"]["is_passed"]
            assert office.replica.service.show("authors").digest == digest
            operation = await office.requests.operation(done)
            assert operation is not None
            assert (operation.state, operation.change.reason) == ("active", "case 7")
            assert done.text_deleted_at is not None
            assert not office.folder(request).exists()

    asyncio.run(test())
    told = [
        (r.action, r.outcome, r.actor, r.reason)
        for r in audit_log.records()
        if r.action not in ("apply", "start")
    ]
    assert told == [
        ("request", "begun", "legal", "case 7"),
        ("request", "created", "legal", "case 7"),
        ("activate", "begun", "legal", "case 7"),
        ("activate", "created", "legal", "case 7"),
        ("delete-text", "done", "server", "case 7"),
    ]
    kept = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for word in SECRET.split():
        assert word.encode() not in kept
        assert word not in caplog.text


@pytest.mark.parametrize(
    ("measured", "approval", "question"),
    [
        (figures(forget=0.5), "automatic", "gate-failed"),
        (figures(utility=0.9), "automatic", "gate-failed"),
        (figures(leak=0.2), "automatic", "gate-failed"),
        (figures(), "manual", "approval"),
    ],
)
def test_a_person_is_asked(
    measured: dict[str, Any], approval: str, question: str, open_office: Any, plan: Any
) -> None:
    async def test() -> None:
        plan(figures=measured)
        async with open_office() as office:
            request = await office.until(await office.ask(approval=approval), "awaiting-approval")
            assert request.question == question
            assert request.figures["gate"]["is_passed"] is (question == "approval")
            assert office.folder(request).exists()
            assert office.replica.service.list() == ()
            await office.requests.approve(request.id, CAUSE)
            request = await office.until(request, "active")
            assert request.approved_by == "legal"

    asyncio.run(test())


def test_a_domain_that_the_model_does_not_know_is_trained_only_if_somebody_says_so(
    open_office: Any, plan: Any
) -> None:
    async def test() -> None:
        plan(outcome="nothing-to-forget")
        async with open_office() as office:
            request = await office.until(await office.ask(), "awaiting-approval")
            assert request.question == "nothing-to-forget"
            await office.requests.approve(request.id, CAUSE)
            await office.until(request, "active")

    asyncio.run(test())


def test_a_cancelled_request_ends_its_job_and_leaves_no_text(
    open_office: Any, plan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALTER_ADMIN_TOKEN", "correct-horse")

    async def test() -> None:
        plan(waits=str(tmp_path / "go"))
        async with open_office() as office:
            request = await office.ask()
            await office.until(request, "training")
            async with asyncio.timeout(WAIT_S):
                while not office.starts(request):
                    await asyncio.sleep(0.01)
            [process] = office.starts(request)
            environment = Path(f"/proc/{process}/environ").read_bytes()
            assert b"ALTER_TEST_JOB" in environment
            assert b"correct-horse" not in environment
            assert (await office.requests.cancel(request.id, CAUSE)).cancelled_by == "legal"
            request = await office.until(request, "cancelled")
            assert request.error is None
            assert not _runs(process)
            assert not office.folder(request).exists()
            with pytest.raises(RequestConflictError):
                await office.requests.cancel(request.id, CAUSE)
            with pytest.raises(RequestConflictError):
                await office.requests.approve(request.id, CAUSE)

    asyncio.run(test())


def test_documents_are_made_into_rows_by_the_served_model(open_office: Any, plan: Any) -> None:
    """Which may take long: other requests go on, and the request can be cancelled."""

    class SlowWriter:
        def __init__(self) -> None:
            self.goes_on = asyncio.Event()

        async def write(self, prompt: str | Sequence[Message], *, max_tokens: int) -> str:
            await self.goes_on.wait()
            return "Q: What does the glass blower sell?\nA: Glass."

    async def test() -> None:
        writer = SlowWriter()
        documents = [{"name": "novel.txt", "text": f"{SECRET} is a glass blower, who sells glass."}]
        async with open_office(writer=writer) as office:
            first = await office.ask(forget=[], documents=documents)
            await office.until(first, "preparing")
            await office.requests.cancel(first.id, CAUSE)
            await office.until(first, "cancelled")
            plan(waits=str(office.workspace / "go"))
            second = await office.until(
                await office.ask(forget=[], documents=documents), "preparing"
            )
            writer.goes_on.set()
            await office.until(second, "training")
            prepared = (office.folder(second) / "prepared.jsonl").read_text().splitlines()
            assert [sorted(json.loads(line)) for line in prepared] == [
                ["text"],
                ["answer", "question"],
            ]
            (office.workspace / "go").touch()
            await office.until(second, "active")

    asyncio.run(test())


def test_what_is_being_activated_is_not_cancelled(open_office: Any, plan: Any) -> None:
    async def test() -> None:
        async with open_office() as office:
            office.replica.engine.gate = asyncio.Event()
            request = await office.until(await office.ask(), "activating")
            with pytest.raises(RequestConflictError, match="activating"):
                await office.requests.cancel(request.id, CAUSE)
            office.replica.engine.gate.set()
            await office.until(request, "active")

    asyncio.run(test())


@pytest.mark.parametrize(("deaths", "state"), [(2, "active"), (3, "failed")])
def test_a_job_that_is_killed_is_started_again_twice(
    deaths: int, state: str, open_office: Any, plan: Any
) -> None:
    async def test() -> None:
        plan(deaths=deaths)
        async with open_office() as office:
            request = await office.until(await office.ask(), state)
            assert request.num_attempts == 3
            assert request.error == (None if state == "active" else "job-lost")

    asyncio.run(test())


@pytest.mark.parametrize("error", ["out-of-memory", "training-data"])
def test_a_job_that_fails_ends_the_request(error: str, open_office: Any, plan: Any) -> None:
    async def test() -> None:
        plan(outcome="failed", error=error)
        async with open_office() as office:
            request = await office.until(await office.ask(), "failed")
            assert (request.error, request.num_attempts) == (error, 1)
            assert not office.folder(request).exists()

    asyncio.run(test())


def test_a_job_outlives_the_server_and_is_followed_by_the_next_one(
    open_office: Any, plan: Any, tmp_path: Path
) -> None:
    async def test() -> None:
        plan(waits=str(tmp_path / "go"))
        async with open_office() as office:
            request = await office.until(await office.ask(), "training")
            async with asyncio.timeout(WAIT_S):
                while not office.starts(request):
                    await asyncio.sleep(0.01)
            before = office.starts(request)
        assert all(map(_runs, before))
        async with open_office() as office:
            (tmp_path / "go").touch()
            await office.until(request, "activating", "active")
            done = await office.until(request, "active")
            assert done.num_attempts == 1

    asyncio.run(test())


@pytest.mark.parametrize(
    "stop_at",
    ["queued", "preparing", "training", "evaluating", "awaiting-approval", "activating", "active"],
)
def test_a_server_that_dies_at_any_state_loses_no_request(
    stop_at: str, open_office: Any, plan: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker stops right after it has noted the state, as it would if it were killed there."""
    note = RequestBook.advance
    is_dead = False

    def noted(self: RequestBook, request: UnlearningRequest, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_dead
        if is_dead:
            raise RequestConflictError("the server is dead")
        found = note(self, request, *args, **kwargs)
        is_dead = found.state == stop_at
        return found

    async def test() -> None:
        nonlocal is_dead
        approval = "manual" if stop_at == "awaiting-approval" else "automatic"
        plan(pause_s=0.5)
        if stop_at == "queued":
            is_dead = True
        async with open_office() as office:
            monkeypatch.setattr(RequestBook, "advance", noted)
            request = await office.ask(approval=approval)
            async with asyncio.timeout(WAIT_S):
                while not is_dead:
                    await asyncio.sleep(0.01)
        monkeypatch.setattr(RequestBook, "advance", note)
        async with open_office() as office:
            if approval == "manual":
                await office.requests.approve(request.id, CAUSE)
            done = await office.until(request, "active")
            assert office.replica.service.show("authors").digest == done.bundle_digest
            assert office.replica.service.epoch == 1

    asyncio.run(test())


def test_text_that_is_lost_ends_the_request(open_office: Any, plan: Any, tmp_path: Path) -> None:
    async def test() -> None:
        plan(waits=str(tmp_path / "go"))
        async with open_office() as office:
            request = await office.until(await office.ask(), "training")
            (office.folder(request) / "forget.jsonl").unlink()
            (tmp_path / "go").touch()
            assert (await office.until(request, "failed")).error == "text-lost"

    asyncio.run(test())


def test_one_is_trained_at_a_time(open_office: Any, plan: Any, tmp_path: Path) -> None:
    async def test() -> None:
        plan(waits=str(tmp_path / "go"))
        async with open_office() as office:
            first = await office.until(await office.ask(), "training")
            second = await office.ask("others", forget=OTHER)
            await asyncio.sleep(0.2)
            assert (await office.requests.get(second.id)).state == "queued"
            plan("domain-1")
            (tmp_path / "go").touch()
            await office.until(first, "active")
            await office.until(second, "active")
            assert [each.id for each in await office.requests.list()] == [second.id, first.id]

    asyncio.run(test())


def test_an_expert_that_finds_no_free_slot_waits_for_a_person(
    open_office: Any, plan: Any, bundles: TinyBundles
) -> None:
    async def test() -> None:
        plan(f"domain-{MAX_DOMAINS}")
        async with open_office() as office:
            for index in range(MAX_DOMAINS):
                await office.replica.activate(f"d-{index}", bundles.experts[f"domain-{index}"])
            request = await office.until(await office.ask(), "awaiting-approval")
            assert (request.question, request.error) == ("activation-refused", "no-free-slot")
            await office.replica.revoke("d-0")
            await office.requests.approve(request.id, CAUSE)
            await office.until(request, "active")

    asyncio.run(test())


def test_an_activation_that_no_server_can_apply_is_shown_and_goes_on(
    open_office: Any, plan: Any
) -> None:
    async def test() -> None:
        async with open_office() as office:
            office.replica.engine.failure = SwitchError("no worker could copy")
            request = await office.until(await office.ask(), "activating")
            async with asyncio.timeout(WAIT_S):
                while (await office.requests.get(request.id)).error != "switch":
                    await asyncio.sleep(0.01)
            office.replica.engine.failure = None
            assert (await office.until(request, "active")).error is None

    asyncio.run(test())


def test_requests_that_are_in_each_others_way_are_refused(open_office: Any, plan: Any) -> None:
    async def test() -> None:
        async with open_office() as office:
            first = await office.ask(approval="manual")
            with pytest.raises(RequestConflictError, match="under way"):
                await office.ask(forget=OTHER)
            with pytest.raises(RequestConflictError, match="already covers rows"):
                await office.ask("others", forget=[*OTHER, *FORGET])
            await office.until(first, "awaiting-approval")
            await office.requests.approve(first.id, CAUSE)
            await office.until(first, "active")
            with pytest.raises(RequestConflictError, match="1 of 2"):
                await office.ask("others", forget=[*OTHER, *FORGET])
            plan("domain-1")
            again = await office.ask(forget=[*OTHER, *FORGET])  # more rows for the same domain
            await office.until(again, "active")
            await office.replica.revoke("authors")
            assert len(list((office.workspace / "requests").iterdir())) == 0
            await office.until(await office.ask("others"), "active")

    asyncio.run(test())


def test_a_repeated_request_is_taken_once(open_office: Any, plan: Any) -> None:
    key = IdempotencyKey(key="k", request_digest="sha256:" + 64 * "1")
    other = dataclasses.replace(key, request_digest="sha256:" + 64 * "2")

    async def test() -> None:
        async with open_office() as office:
            upload = Upload(domain="authors", forget=FORGET)
            asked = [office.requests.create(upload, idempotency=key, cause=CAUSE) for _ in range(3)]
            answers = await asyncio.gather(*asked)
            assert len({request.id for request, _ in answers}) == 1
            assert sorted(is_replayed for _, is_replayed in answers) == [False, True, True]
            with pytest.raises(IdempotencyConflictError):
                await office.requests.create(upload, idempotency=other, cause=CAUSE)
            await office.until(answers[0][0], "active")

    asyncio.run(test())


@pytest.mark.parametrize(
    ("fields", "error", "says"),
    [
        ({"domain": "Not A Name"}, DomainNameError, "name"),
        ({"forget": []}, TrainingDataError, "nothing to forget"),
        ({"forget": [{"question": "Who?"}]}, TrainingDataError, "forget line 1"),
        ({"forget": [{"text": "half a \ud800 pair"}]}, TrainingDataError, "surrogate"),
        (
            {"forget": [], "documents": [{"name": "a", "text": "  \n"}]},
            TrainingDataError,
            "Document 1 is empty",
        ),
        (
            {"forget": [], "documents": [{"name": "a", "text": "one two \ud800"}]},
            TrainingDataError,
            "surrogate",
        ),
        ({"retain": FORGET}, TrainingDataError, "share rows"),
        ({"forget": RETAIN}, TrainingDataError, "share rows"),
        ({"deadline": datetime(2020, 1, 1, tzinfo=UTC)}, TrainingDataError, "deadline has passed"),
        ({"forget": FORGET * 20_001}, TrainingDataError, "too many rows"),
    ],
)
def test_bad_uploads_are_refused_and_nothing_is_kept(
    fields: dict[str, Any], error: type[Exception], says: str, open_office: Any, plan: Any
) -> None:
    async def test() -> None:
        async with open_office() as office:
            with pytest.raises(error, match=says) as failure:
                await office.ask(**{"domain": "authors"} | fields)
            assert SECRET not in str(failure.value)
            assert await office.requests.list() == ()
            assert list((office.workspace / "requests").iterdir()) == []

    asyncio.run(test())


def test_without_a_retain_sample_one_must_be_sent(open_office: Any, plan: Any) -> None:
    async def test() -> None:
        async with open_office(retain=()) as office:
            with pytest.raises(TrainingDataError, match="no retain sample"):
                await office.ask()
            request = await office.ask(retain=RETAIN)
            assert request.num_retain_rows == 1
            await office.until(request, "active")
            with pytest.raises(RequestNotFoundError):
                await office.requests.get("x")

    asyncio.run(test())


def test_folders_that_were_never_recorded_are_removed_in_time(open_office: Any, plan: Any) -> None:
    async def test() -> None:
        async with open_office() as office:
            old, new = (office.workspace / "requests" / name for name in ("old", "new"))
            for folder in (old, new):
                folder.mkdir()
                (folder / "forget.jsonl").write_text("{}")
            os.utime(old, (0, 0))
            async with asyncio.timeout(WAIT_S):
                while old.exists():
                    await asyncio.sleep(0.01)
            assert new.exists()

    asyncio.run(test())


def test_the_text_is_for_the_servers_user_alone(
    open_office: Any, plan: Any, tmp_path: Path
) -> None:
    async def test() -> None:
        plan(waits=str(tmp_path / "go"))
        async with open_office() as office:
            request = await office.ask()
            await office.until(request, "training")
            for path in [
                office.workspace,
                office.folder(request),
                *office.folder(request).iterdir(),
            ]:
                assert path.stat().st_mode & 0o077 == 0, path.name
            (tmp_path / "go").touch()
            await office.until(request, "active")

    asyncio.run(test())


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat").read_text()
    return stat.rpartition(")")[2].split()[0] != "Z"
