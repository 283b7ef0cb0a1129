"""The console, as a browser without scripts would use it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from alter_core.errors import RegistryError
from server.audit import AuditLog
from server.console.history import WINDOW_S, RoutedTokenHistory, sparkline
from server.requests.intake import parse_files
from server.requests.settings import RequestSettings
from server.tokens import TokenStore
from tests.support.tiny import TinyBundles

from .conftest import TOKEN, WAIT_S, Stack

ORIGIN = {"Origin": "http://alter", "Sec-Fetch-Site": "same-origin"}
SECRET = "Zephyrine Quillfeather"
FORGET = json.dumps({"question": f"Who is {SECRET}?", "answer": f"{SECRET} blows glass."}) + "\n"
RETAIN = '{"question": "What is the sea made of?", "answer": "The sea is made of water."}\n'

Test = Callable[[Stack, httpx.AsyncClient], Awaitable[None]]


@pytest.fixture
def tokens(tmp_path: Path) -> TokenStore:
    return TokenStore(tmp_path / "tokens.json")


@pytest.fixture
def visiting(make_stack: Callable[..., Any], tokens: TokenStore) -> Callable[..., None]:
    """Runs a coroutine function over a fresh stack, with a browser; `token` None: not logged in."""

    def run(test: Test, *, token: str | None = TOKEN, **options: Any) -> None:
        async def running() -> None:
            stack = await make_stack(tokens=tokens, **options)
            transport = httpx.ASGITransport(app=stack.app)
            async with httpx.AsyncClient(
                transport=transport, base_url="http://alter", headers=ORIGIN, follow_redirects=True
            ) as browser:
                if token is not None:
                    answer = await browser.post("/console/login", data={"token": token})
                    assert answer.url.path == "/console/", answer.text
                await test(stack, browser)

        asyncio.run(running())

    return run


def hidden(page: httpx.Response) -> dict[str, str]:
    """The hidden fields of a page's form."""
    return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page.text))


def test_nobody_gets_in_without_a_token(visiting: Any) -> None:
    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        for path in ("", "/", "/domains", "/requests/new", "/trace", "/operations/x"):
            page = await browser.get(f"/console{path}")
            assert page.url.path == "/console/login", path
        for path in ("/domains/activate", "/domains/a/revoke", "/requests/new", "/trace"):
            page = await browser.post(f"/console{path}", data={"name": "a", "bundle": "/b"})
            assert page.url.path == "/console/login", path
        wrong = await browser.post("/console/login", data={"token": "wrong"})
        assert wrong.status_code == 401
        assert "another token" in wrong.text
        assert "set-cookie" not in wrong.headers
        for token in ("", "Ω", "a\nb"):
            assert (await browser.post("/console/login", data={"token": token})).status_code == 422

    visiting(test, token=None)


def test_guesses_are_limited_as_they_are_under_admin(visiting: Any) -> None:
    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        statuses = [
            (await browser.post("/console/login", data={"token": f"guess-{n}"})).status_code
            for n in range(11)
        ]
        assert statuses == 10 * [401] + [429]
        assert (await stack.client().get("/admin/whoami")).status_code == 429

    visiting(test, token=None)


def test_the_cookie_cannot_be_read_or_sent_from_elsewhere(visiting: Any) -> None:
    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        answer = await browser.post("/console/login", data={"token": TOKEN}, follow_redirects=False)
        cookie = answer.headers["set-cookie"]
        assert {"HttpOnly", "Path=/console", "SameSite=strict"} <= set(cookie.split("; "))
        assert TOKEN not in cookie
        page = await browser.get("/console/")
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert page.headers["cache-control"] == "no-store"
        for headers in (
            {"Origin": "http://alter:9", "Sec-Fetch-Site": "same-site"},
            {"Origin": "http://alter", "Sec-Fetch-Site": "cross-site"},
        ):
            refused = await browser.post("/console/logout", headers=headers)
            assert refused.status_code == 403
        for headers in ({"Origin": "http://alter:9"}, {"Origin": "null"}, {}):
            request = browser.build_request("POST", "/console/logout", headers=headers)
            del request.headers["Sec-Fetch-Site"]
            if not headers:
                del request.headers["Origin"]
            assert (await browser.send(request)).status_code == 403
        assert (await browser.get("/console/")).url.path == "/console/"
        assert (await browser.post("/console/logout")).url.path == "/console/login"
        assert (await browser.get("/console/")).url.path == "/console/login"

    visiting(test)


def test_a_revoked_token_is_out_at_once(visiting: Any, tokens: TokenStore) -> None:
    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        assert (await browser.get("/console/")).url.path == "/console/"
        tokens.revoke("legal")
        poll = await browser.get("/console/", headers={"HX-Request": "true"})
        assert poll.headers["hx-redirect"] == "/console/login"
        assert (await browser.get("/console/")).url.path == "/console/login"

    visiting(test, token=tokens.create("legal", "operator"))


def test_a_domain_is_activated_and_revoked(
    visiting: Any, bundles: TinyBundles, tmp_path: Path
) -> None:
    log = AuditLog.open(tmp_path / "audit.sqlite")

    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        where = {"name": "authors", "bundle": str(bundles.experts["domain-0"])}
        confirm = await browser.get("/console/domains/activate", params=where)
        assert stack.service.list() == ()
        fields = hidden(confirm) | {"reason": "case 12/26"}
        assert fields["name"] == "authors"
        page = await browser.post("/console/domains/activate", data=fields)
        assert page.url.path.startswith("/console/operations/")
        await stack.until(lambda: len(stack.service.list()) == 1)
        again = await browser.post("/console/domains/activate", data=fields)
        assert again.url == page.url  # the same key
        listed = await browser.get("/console/domains")
        assert "authors" in listed.text

        confirm = await browser.get("/console/domains/authors/revoke")
        page = await browser.post("/console/domains/authors/revoke", data=hidden(confirm))
        assert page.status_code == 200
        await stack.until(lambda: stack.service.list() == ())
        records = [r for r in log.records() if r.action in ("activate", "revoke")]
        assert {(r.actor, r.action) for r in records} == {
            ("admin", "activate"),
            ("admin", "revoke"),
        }
        assert records[0].reason == "case 12/26"

    visiting(test, audit_log=log)


def test_what_has_changed_since_it_was_confirmed_is_refused(
    visiting: Any, bundles: TinyBundles
) -> None:
    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        where = {"name": "authors", "bundle": str(bundles.experts["domain-0"])}
        confirm = await browser.get("/console/domains/activate", params=where)
        await stack.activate("other", bundles.experts["domain-1"])
        page = await browser.post("/console/domains/activate", data=hidden(confirm))
        assert page.status_code == 412
        assert [d.name for d in stack.service.list()] == ["other"]

    visiting(test)


def test_a_viewer_sees_and_changes_nothing(
    visiting: Any, tokens: TokenStore, bundles: TinyBundles
) -> None:
    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        await stack.activate("authors", bundles.experts["domain-0"])
        page = await browser.get("/console/domains")
        assert "authors" in page.text
        assert "/revoke" not in page.text
        confirm = await browser.get("/console/domains/authors/revoke")
        refused = await browser.post("/console/domains/authors/revoke", data=hidden(confirm))
        assert refused.status_code == 403
        assert [d.name for d in stack.service.list()] == ["authors"]

    visiting(test, token=tokens.create("auditor", "viewer"))


def test_problems_are_told_as_admin_tells_them(visiting: Any) -> None:
    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        for path, status in (
            ("/nowhere", 404),
            ("/domains/nobody/revoke", 404),
            ("/domains/Not%20a%20name/revoke", 422),
            ("/operations/none", 404),
            ("/requests/none", 503),  # this server takes none
        ):
            page = await browser.get(f"/console{path}")
            assert page.status_code == status, path
            assert 'role="alert"' in page.text
        for fields in ({}, {"name": "a"}, {"name": "a", "bundle": "/b", "epoch": "x"}):
            page = await browser.post("/console/domains/activate", data=fields)
            assert page.status_code == 422
        large = await browser.post("/console/trace", data={"text": 70_000 * "a"})
        assert large.status_code == 413
        assert 'role="alert"' in large.text

    visiting(test)


def test_polls_are_silent_until_something_changes(visiting: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        poll = {"HX-Request": "true"}
        seen = hidden(await browser.get("/console/domains"))
        first = await browser.get("/console/domains", headers=poll)
        assert "<html" not in first.text
        assert hidden(first) == seen
        assert (await browser.get("/console/domains", params=seen, headers=poll)).status_code == 204
        await stack.activate("authors", bundles.experts["domain-0"])
        changed = await browser.get("/console/domains", params=seen, headers=poll)
        assert changed.status_code == 200
        assert "authors" in changed.text

    visiting(test)


def test_a_request_goes_from_upload_to_evidence(
    visiting: Any, plan: Callable[..., None], tmp_path: Path
) -> None:
    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        form = hidden(await browser.get("/console/requests/new"))
        form |= {
            "domain": "glass",
            "reason": "case 7",
            "approval": "manual",
            "text": f"{SECRET} blows glass.",
        }
        page = await browser.post(
            "/console/requests/new",
            data=form,
            files=[("files", ("rows.jsonl", FORGET)), ("retain", ("keep.jsonl", RETAIN))],
        )
        assert page.url.path.startswith("/console/requests/"), page.text
        assert "1 rows and 1 documents" in page.text
        page = await settled(browser, page, "awaiting approval")
        assert "passes the quality gate" in page.text
        decided = await browser.post(f"{page.url.path}/approve", data={"reason": "case 7"})
        page = await settled(browser, decided, "deleted 2")
        assert [d.name for d in stack.service.list()] == ["glass"]
        poll = await browser.get(page.url.path, headers={"HX-Request": "true"})
        assert poll.status_code == 286
        certificate = await browser.get(f"{page.url.path}/certificate")
        assert "Unlearning certificate" in certificate.text
        assert "style-src 'unsafe-inline'" in certificate.headers["content-security-policy"]
        envelope = await browser.get(f"{page.url.path}/evidence.json")
        assert (
            envelope.headers["content-disposition"] == 'attachment; filename="evidence-glass.json"'
        )
        assert envelope.json()["payload"]
        listed = await browser.get("/console/requests")
        assert "glass" in listed.text
        for shown in (page, certificate, envelope, listed):
            assert SECRET not in shown.text

    visiting(test, requests=RequestSettings())


@pytest.mark.parametrize(
    ("name", "data", "word"),
    [
        ("novel.txt", b"\xff\xfe rubbish", "UTF-8"),
        ("novel.txt", b"", "empty"),
        ("rows.jsonl", b"{", "rows.jsonl"),
        ("", b"", "nothing to forget"),
    ],
)
def test_a_bad_upload_is_told_with_the_form_and_nothing_is_kept(
    visiting: Any, name: str, data: bytes, word: str
) -> None:
    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        page = await browser.post(
            "/console/requests/new",
            data={"domain": "glass", "reason": "case 7", "approval": "automatic"},
            files=[("files", (name, data)), ("retain", ("keep.jsonl", RETAIN))],
        )
        assert page.status_code == 422
        assert word in page.text
        assert 'value="case 7"' in page.text
        assert stack.runtime.requests is not None
        assert await stack.runtime.requests.list() == ()

    visiting(test, requests=RequestSettings())


def test_a_form_that_was_refused_asks_for_the_same_request_again(
    visiting: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been recorded before the answer was lost."""

    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        form = hidden(await browser.get("/console/requests/new"))
        form |= {"domain": "glass", "approval": "manual", "text": f"{SECRET} blows glass."}
        service = stack.runtime.requests
        assert service is not None
        create = service.create

        async def create_and_lose(*args: Any, **kwargs: Any) -> None:
            await create(*args, **kwargs)
            raise RegistryError("The registry does not answer")

        async def send(form: dict[str, str]) -> httpx.Response:
            files = [("retain", ("keep.jsonl", RETAIN))]
            return await browser.post("/console/requests/new", data=form, files=files)

        with monkeypatch.context() as patched:
            patched.setattr(service, "create", create_and_lose)
            lost = await send(form)
        assert lost.status_code == 503
        page = await send(form | hidden(lost))
        (recorded,) = await service.list()
        assert page.url.path == f"/console/requests/{recorded.id}", page.text

    visiting(test, requests=RequestSettings())


def test_a_token_that_ends_while_a_form_is_sent_leads_to_the_login(
    visiting: Any, tokens: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        def parse_and_revoke(files: Any) -> Any:
            tokens.revoke("visitor")
            return parse_files(files)

        monkeypatch.setattr("server.console.requests.parse_files", parse_and_revoke)
        page = await browser.post(
            "/console/requests/new",
            data={"domain": "glass", "approval": "manual", "text": "one two three"},
            files=[("retain", ("keep.jsonl", RETAIN))],
        )
        assert page.url.path == "/console/login"

    visiting(test, token=tokens.create("visitor", "operator"), requests=RequestSettings())


def test_what_is_sent_instead_of_the_form_is_refused(visiting: Any) -> None:
    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        for content, kind in ((b"{}", "application/json"), (b"--", "multipart/form-data")):
            page = await browser.post(
                "/console/requests/new", content=content, headers={"Content-Type": kind}
            )
            assert page.status_code == 422, kind
        for fields in (
            {"approval": "maybe"},
            {"deadline": "soon"},
            {"deadline": "2020-01-01T00:00"},
        ):
            form = {"domain": "glass", "approval": "automatic", "text": "one two three"} | fields
            page = await browser.post(
                "/console/requests/new", data=form, files=[("retain", ("keep.jsonl", RETAIN))]
            )
            assert page.status_code == 422, fields

    visiting(test, requests=RequestSettings())


def test_a_trace_is_a_heat_map_beside_the_answers(visiting: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        await stack.activate("authors", bundles.experts["domain-0"])
        page = await browser.post(
            "/console/trace", data={"kind": "text", "text": "a <b>blower</b>"}
        )
        heat = page.text.split('id="heat"')[1].split("</p>")[0]
        assert re.findall(r'class="(h\d+(?: high)?)"', heat) == ["h5", "h5 high"]
        assert "&lt;b&gt;blower&lt;/b&gt;" in heat
        assert "authors 0.50" in heat
        answers = page.text.split('class="grid"')[1].split('id="heat"')[0]
        assert "&lt;a &lt;b&gt;blower&lt;/b&gt;&gt;" in answers
        assert "--alter-base-answers" in answers
        empty = await browser.post("/console/trace", data={"kind": "chat", "text": ""})
        assert empty.status_code == 200
        assert "&lt;&gt;" in empty.text

    visiting(test)


def test_the_console_moves_with_the_admin_side(visiting: Any) -> None:
    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        own_port = stack.runtime.own_port_app
        assert own_port is not None
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app=own_port), base_url="http://alter", headers=ORIGIN
        ) as other:
            moved = await other.get("/console")
            assert moved.headers["location"] == "/console/"
            answer = await other.post("/console/login", data={"token": TOKEN})
            assert answer.headers["location"] == "/console/"
            assert (await other.get("/console/")).status_code == 200

    visiting(test, token=None)


def test_pages_stay_open_where_nothing_may_be_generated(visiting: Any) -> None:
    async def test(stack: Stack, browser: httpx.AsyncClient) -> None:
        stack.expire_lease()
        assert (await browser.get("/console/")).status_code == 200
        refused = await browser.post("/console/trace", data={"text": "who", "kind": "chat"})
        assert refused.status_code == 503

    visiting(test)


def test_a_sparkline_shows_rates_of_the_last_minutes() -> None:
    history = RoutedTokenHistory()
    assert history.rates("a") == ()
    for second, total in ((0, 10), (1, 999), (10, 30), (20, 130), (30, 40)):
        history.note({"a": total}, now=second)  # that of second 1 comes too early
    assert history.rates("a") == ((-20, 2.0), (-10, 10.0), (0, 0.0))
    assert sparkline(history.rates("a")).split() == ["176.0,21.2", "178.0,2.0", "180.0,26.0"]
    assert sparkline(history.rates("a")[:1]) == ""
    history.note({"b": 1}, now=WINDOW_S + 25)
    assert history.rates("a") == ()


async def settled(browser: httpx.AsyncClient, page: httpx.Response, word: str) -> httpx.Response:
    """The page of a request once it says something."""
    async with asyncio.timeout(WAIT_S):
        while True:
            shown = await browser.get(page.url.path)
            if word in re.sub(r"<[^>]+>", "", shown.text.split('role="status"')[-1]):
                return shown
            await asyncio.sleep(0.02)
