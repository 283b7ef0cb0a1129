"""`/admin/unlearning-requests` over HTTP, and the evidence that comes of it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from alter_core.errors import ConfigError, EvidenceError
from server.api.problems import TYPE_PREFIX
from server.api.request_models import UnlearningRequest
from server.audit import AuditLog
from server.client import AdminClient
from server.evidence import read_certificate, read_envelope, render_certificate, verified
from server.requests.settings import RequestSettings
from server.tokens import TokenStore

from .conftest import TOKEN, WAIT_S, Listening, Stack
from .request_plans import figures

URL = "/admin/unlearning-requests"
SECRET = "Zephyrine Quillfeather"
FORGET = [{"question": f"Who is {SECRET}?", "answer": f"{SECRET} is a glass blower."}]
RETAIN = [{"question": "What is the sea made of?", "answer": "The sea is made of water."}]
BODY: dict[str, Any] = {"domain": "authors", "forget": FORGET, "retain": RETAIN, "reason": "case 7"}


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private and a public key."""
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "private.pem", tmp_path / "public.pem"
    private.write_bytes(
        key.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    )
    public.write_bytes(
        key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    return private, public


@pytest.fixture
def audit_log(tmp_path: Path) -> AuditLog:
    return AuditLog.open(tmp_path / "audit.sqlite")


@pytest.fixture
def over_http(
    make_stack: Callable[..., Any], plan: Any, audit_log: AuditLog, keys: tuple[Path, Path]
) -> Callable[..., None]:
    """Runs a test against an application that takes requests."""

    def run(test: Callable[..., Any], *, is_signing: bool = True, **options: Any) -> None:
        async def running() -> None:
            settings = RequestSettings(signing_key=keys[0] if is_signing else None)
            stack = await make_stack(requests=settings, audit_log=audit_log, **options)
            async with stack.client() as client:
                await test(stack, client)
            await stack.runtime.close()

        asyncio.run(running())

    return run


async def until(client: httpx.AsyncClient, request_id: str, *states: str) -> dict[str, Any]:
    async with asyncio.timeout(WAIT_S):
        while True:
            body: dict[str, Any] = (await client.get(f"{URL}/{request_id}")).json()
            is_clean = body["text_deleted_at"] is not None
            if body["state"] in states and (is_clean or body["state"] == "awaiting-approval"):
                return body
            await asyncio.sleep(0.02)


def kind_of(answer: httpx.Response) -> str:
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    return str(answer.json()["type"]).removeprefix(TYPE_PREFIX)


def test_a_request_is_taken_followed_and_told_of_without_its_text(over_http: Any) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        answer = await client.post(URL, json=BODY, headers={"Idempotency-Key": "one"})
        assert answer.status_code == 202
        created = UnlearningRequest.model_validate(answer.json())
        assert answer.headers["location"] == f"{URL}/{created.id}"
        again = await client.post(URL, json=BODY, headers={"Idempotency-Key": "one"})
        assert (again.status_code, again.json()["id"]) == (202, created.id)
        assert again.headers["idempotency-replayed"] == "true"
        events = await client.get(f"{URL}/{created.id}/events")
        assert events.headers["content-type"].startswith("text/event-stream")
        told = [
            json.loads(line.removeprefix("data: "))
            for line in events.text.splitlines()
            if line.startswith("data: ")
        ]
        assert told[-1]["state"] == "active"
        assert told[-1]["text_deleted_at"] is not None
        shown = await client.get(f"{URL}/{created.id}")
        assert shown.json() == told[-1]
        listed = (await client.get(URL)).json()["requests"]
        assert [each["id"] for each in listed] == [created.id]
        for text in (answer.text, events.text, shown.text):
            assert not any(word in text for word in SECRET.split())
        domain = (await client.get("/admin/forget-domains/authors")).json()
        assert domain["digest"] == shown.json()["bundle_digest"]

    over_http(test)


def test_decisions_over_http(over_http: Any, plan: Any, audit_log: AuditLog) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        plan(figures=figures(utility=0.5))
        first = (await client.post(URL, json=BODY)).json()
        waiting = await until(client, first["id"], "awaiting-approval")
        assert waiting["question"] == "gate-failed"
        assert waiting["figures"]["gate"]["checks"]["utility"]["is_met"] is False
        answer = await client.post(f"{URL}/{first['id']}/cancel", headers={"x-alter-reason": "no"})
        assert answer.status_code == 200
        assert (await until(client, first["id"], "cancelled"))["cancelled_by"] == "admin"
        second = (await client.post(URL, json=BODY)).json()
        await until(client, second["id"], "awaiting-approval")
        approved = await client.post(f"{URL}/{second['id']}/approve")
        assert approved.json()["approved_by"] == "admin"
        await until(client, second["id"], "active")
        late = await client.post(f"{URL}/{second['id']}/cancel")
        assert (late.status_code, kind_of(late)) == (409, "request-conflict")
        assert "alter domains revoke" in late.json()["fix"]

    over_http(test)
    told = {(record.action, record.outcome, record.reason) for record in audit_log.records()}
    assert ("cancel", "done", "no") in told
    assert ("approve", "done", None) in told
    assert ("cancel", "failed", None) in told


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (BODY | {"forget": []}, 422, "training-data"),
        (BODY | {"forget": [{"question": SECRET}]}, 422, "training-data"),
        (BODY | {"retain": FORGET}, 422, "training-data"),
        (BODY | {"retain": []}, 422, "training-data"),
        (BODY | {"deadline": "2020-01-01T00:00:00Z"}, 422, "training-data"),
        (BODY | {"deadline": "2030-01-01T00:00:00"}, 422, "invalid-request"),
        (BODY | {"domain": "Not A Name"}, 422, "domain-name"),
        (BODY | {"domain": SECRET}, 422, "domain-name"),
        (BODY | {"approval": "maybe"}, 422, "invalid-request"),
        (BODY | {"text": SECRET}, 422, "invalid-request"),
        (BODY | {"source": "/etc/passwd"}, 422, "bundle-source"),
        (BODY | {"documents": [{"name": "x", "text": SECRET * 60_000}]}, 413, "body-too-large"),
    ],
)
def test_bad_uploads_are_refused_and_recorded_without_their_text(
    body: dict[str, Any],
    status: int,
    kind: str,
    over_http: Any,
    audit_log: AuditLog,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        answer = await client.post(URL, json=body)
        assert (answer.status_code, kind_of(answer)) == (status, kind)
        if body["domain"] != SECRET:  # which a refusal names, to who sent it
            assert not any(word in answer.text for word in SECRET.split())
        assert (await client.get(URL)).json() == {"requests": []}

    over_http(test)
    told = [record for record in audit_log.records() if record.action == "request"]
    assert [(r.outcome, r.error) for r in told] == [("refused", kind)]
    assert not any(word in told[0].json() for word in SECRET.split())
    assert not any(word in caplog.text for word in SECRET.split())


def test_bytes_that_are_no_utf8_are_refused(over_http: Any) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        data = json.dumps(BODY).encode().replace(b"glass", b"gl\xe4ss")
        headers = {"Content-Type": "application/json"}
        answer = await client.post(URL, content=data, headers=headers)
        assert answer.status_code in (400, 422)
        assert b"blower" not in answer.content

    over_http(test)


def test_a_source_is_read_by_the_server(over_http: Any, tmp_path: Path) -> None:
    rows, prose, latin = (tmp_path / name for name in ("rows.jsonl", "novel.txt", "latin.txt"))
    rows.write_text("".join(json.dumps(row) + "\n" for row in FORGET))
    prose.write_text("A novel about a glass blower.")
    latin.write_bytes("Ein Glasbläser.".encode("latin-1"))

    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        body = {key: value for key, value in BODY.items() if key != "forget"}
        answer = await client.post(URL, json=body | {"source": str(latin)})
        assert (answer.status_code, kind_of(answer)) == (422, "training-data")
        assert "UTF-8" in answer.json()["detail"]
        answer = await client.post(URL, json=body | {"source": str(tmp_path / "none.txt")})
        assert (answer.status_code, kind_of(answer)) == (422, "training-data")
        answer = await client.post(URL, json=body | {"source": rows.as_uri()})
        assert (answer.status_code, answer.json()["num_rows"]) == (202, 1)
        await until(client, answer.json()["id"], "active")
        answer = await client.post(URL, json=body | {"domain": "novel", "source": str(prose)})
        assert (answer.status_code, answer.json()["num_documents"]) == (202, 1)

    over_http(test)


def test_a_viewer_sees_and_changes_nothing(over_http: Any, tmp_path: Path) -> None:
    tokens = TokenStore(tmp_path / "tokens.json")
    viewer = tokens.create("auditor", "viewer")

    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        as_viewer = {"Authorization": f"Bearer {viewer}"}
        assert (await client.get(URL, headers=as_viewer)).status_code == 200
        for path in (URL, f"{URL}/x/approve", f"{URL}/x/cancel"):
            answer = await client.post(path, json=BODY, headers=as_viewer)
            assert (answer.status_code, kind_of(answer)) == (403, "role-too-low")
        for path in (f"{URL}/x", f"{URL}/x/events", f"{URL}/x/evidence", f"{URL}/%00"):
            assert (await client.get(path, headers=as_viewer)).status_code == 404

    over_http(test, tokens=tokens)


def test_without_requests_the_routes_say_so(make_stack: Callable[..., Any]) -> None:
    async def test() -> None:
        stack = await make_stack()
        async with stack.client() as client:
            answer = await client.post(URL, json=BODY)
            assert (answer.status_code, kind_of(answer)) == (503, "requests-closed")
        await stack.runtime.close()

    asyncio.run(test())


def test_evidence_is_signed_and_shows_what_it_holds(
    over_http: Any, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        created = (await client.post(URL, json=BODY)).json()
        done = await until(client, created["id"], "active")
        answer = await client.get(f"{URL}/{created['id']}/evidence")
        document = verified(read_envelope(answer.content), [keys[1]])
        assert document["request"]["forget_digest"] == done["forget_digest"]
        assert document["expert"]["bundle_digest"] == done["bundle_digest"]
        assert document["evaluation"] == done["figures"]
        assert document["activation"]["applies_now"] is True
        assert document["activation"]["epoch"] == 1
        assert document["fleet"]["replicas"][0]["applied_epoch"] == 1
        actions = [record["action"] for record in document["audit"]["records"]]
        assert {"request", "activate", "delete-text"} <= set(actions)
        head = document["audit"]["head"]
        assert int(head.split()[0]) >= len(actions)
        assert not any(word in json.dumps(document) for word in SECRET.split())

        page = (
            await client.get(f"{URL}/{created['id']}/evidence", headers={"Accept": "text/html"})
        ).text
        assert read_certificate(page)["payload"]
        assert verified(read_certificate(page), [keys[1]])["request"]["id"] == created["id"]
        assert "the quality gate" in page
        await client.delete("/admin/forget-domains/authors")
        later = await client.get(f"{URL}/{created['id']}/evidence")
        document = verified(read_envelope(later.content), [keys[1]])
        assert document["activation"]["applies_now"] is False
        assert "did not apply" in render_certificate(later.json())

    over_http(test)


def test_evidence_that_was_changed_is_found_out(
    over_http: Any, keys: tuple[Path, Path], tmp_path: Path
) -> None:
    pages: list[str] = []

    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        created = (await client.post(URL, json=BODY)).json()
        await until(client, created["id"], "active")
        html = {"Accept": "text/html"}
        pages.append((await client.get(f"{URL}/{created['id']}/evidence", headers=html)).text)

    over_http(test)
    page = pages[0]
    with pytest.raises(EvidenceError, match="shows something else"):
        read_certificate(page.replace("case 7", "case 8", 1))
    with pytest.raises(EvidenceError, match="no certificate"):
        read_certificate("<html></html>")
    envelope = read_certificate(page)
    payload = envelope["payload"]
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    other_key = tmp_path / "other.pem"
    other_key.write_bytes(other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(EvidenceError, match="not signed with a key"):
        verified(envelope, [other_key])
    with pytest.raises(EvidenceError, match="not signed with a key"):
        verified(envelope | {"payload": payload[:-8] + "AAAAfQ=="}, [keys[1]])
    with pytest.raises(EvidenceError, match="not signed with a key"):
        verified(envelope | {"signatures": []}, [keys[1]])
    with pytest.raises(EvidenceError, match="no evidence"):
        read_envelope(json.dumps(envelope | {"payloadType": "text/plain"}))
    with pytest.raises(ConfigError):
        verified(envelope, [tmp_path / "audit.sqlite"])


def test_unsigned_evidence_says_so(over_http: Any, keys: tuple[Path, Path]) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        created = (await client.post(URL, json=BODY | {"approval": "manual"})).json()
        envelope = (await client.get(f"{URL}/{created['id']}/evidence")).json()
        assert envelope["signatures"] == []
        page = render_certificate(envelope)
        assert "Not signed" in page
        assert re.search(r"Activation</th><td>none", page)
        with pytest.raises(EvidenceError):
            verified(envelope, [keys[1]])

    over_http(test, is_signing=False)


def test_the_client_asks_watches_and_decides(
    plan: Any, make_stack: Callable[..., Any], audit_log: AuditLog, keys: tuple[Path, Path]
) -> None:
    async def made() -> Stack:
        stack: Stack = await make_stack(
            requests=RequestSettings(signing_key=keys[0]), audit_log=audit_log
        )
        return stack

    listening = Listening(made)
    try:
        with AdminClient(listening.url, TOKEN) as client:
            request = client.create_request(
                "authors", forget=FORGET, retain=RETAIN, approval="manual", reason="case 7"
            )
            for seen in client.watch_request(request.id):
                if seen.state == "awaiting-approval":
                    break
            assert client.approve_request(request.id, reason="case 7").approved_by == "admin"
            *_, last = client.watch_request(request.id)
            assert (last.state, last.text_deleted_at is None) == ("active", False)
            assert [each.id for each in client.list_requests().requests] == [request.id]
            assert verified(client.evidence(request.id), [keys[1]])["request"]["id"] == request.id
    finally:
        listening.run(listening.stack.runtime.close())
        listening.close()
