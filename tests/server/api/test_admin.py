"""HTTP semantics of /admin: statuses, problems, conditions, idempotency, authentication."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from alter_core import errors
from alter_core.errors import AlterError, SwitchError, problem_kind
from server.api.problems import problem_of
from tests.support.tiny import TinyBundles

from .conftest import Stack

Test = Callable[[Stack, httpx.AsyncClient], Awaitable[None]]
URL = "/admin/forget-domains"


@pytest.fixture
def over_http(make_stack: Callable[..., Any]) -> Callable[[Test], None]:
    """Runs a coroutine function over a fresh stack and a client into it."""

    def run(test: Test) -> None:
        async def running() -> None:
            stack = await make_stack()
            async with stack.client() as client:
                await test(stack, client)

        asyncio.run(running())

    return run


def body(bundles: TinyBundles, index: int, name: str = "a", **more: str) -> dict[str, str]:
    return {"name": name, "bundle": str(bundles.experts[f"domain-{index}"]), **more}


def is_problem(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    document: dict[str, Any] = response.json()
    assert response.headers["content-type"] == "application/problem+json"
    assert response.status_code == document["status"] == status, document
    assert document["type"] == f"urn:alter-server:problem:{kind}"
    assert document["title"]
    assert document["detail"]
    assert document["instance"] == response.request.url.path
    return document


def test_life_of_a_domain(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        created = await client.post(URL, json=body(bundles, 0))
        assert created.status_code == 201
        assert created.headers["location"] == "/admin/forget-domains/a"
        assert created.headers["etag"] == '"1"'
        assert created.headers["preference-applied"] == "wait=20"
        answer = created.json()
        assert (answer["outcome"], answer["state"], answer["epoch"]) == ("created", "active", 1)
        assert (answer["lagging"], answer["error"]) == ([], None)
        assert answer["switch"] == {
            "epoch": 1,
            "stage_s": 0.02,
            "pause_s": 0.03,
            "kept_requests": 5,
            "recomputed_requests": 2,
            "recomputed_tokens": 130,
        }
        assert answer["digest"].startswith("sha256:")
        assert answer["domain"]["evaluation"] == {"forget_probability": 0.01}
        assert (await client.get(f"/admin/operations/{answer['id']}")).json() == answer

        again = await client.post(URL, json=body(bundles, 0))
        assert (again.status_code, again.json()["outcome"]) == (200, "unchanged")
        assert (again.json()["switch"], again.json()["id"]) == (None, answer["id"])
        assert "location" not in again.headers

        replaced = await client.post(URL, json=body(bundles, 1, in_flight="abort"))
        assert (replaced.status_code, replaced.headers["etag"]) == (200, '"2"')
        assert replaced.json()["outcome"] == "replaced"
        assert stack.engine.switches[-1]["in_flight"] == "abort"

        stack.engine.counts[0] = (3, 17)
        shown = await client.get(created.headers["location"])
        assert shown.json()["routed_tokens"] == {"high": 3, "low": 17}
        listed = await client.get(URL)
        assert listed.json() == {"epoch": 2, "domains": [shown.json()]}
        assert listed.headers["etag"] == shown.headers["etag"] == '"2"'

        revoked = await client.delete(created.headers["location"])
        assert revoked.status_code == 200
        assert (revoked.json()["outcome"], revoked.json()["switch"]["epoch"]) == ("revoked", 3)
        assert revoked.json()["domain"] is None
        assert (await client.get(URL)).json() == {"epoch": 3, "domains": []}

    over_http(test)


def test_without_a_wish_to_wait_a_change_is_accepted_and_polled(
    over_http: Any, bundles: TinyBundles
) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        del client.headers["prefer"]
        stack.engine.gate = asyncio.Event()
        for ask in (
            lambda: client.post(URL, json=body(bundles, 0)),
            lambda: client.delete(f"{URL}/a"),
        ):
            stack.engine.gate.clear()
            accepted = await ask()
            assert (accepted.status_code, accepted.json()["state"]) == (202, "pending")
            assert "preference-applied" not in accepted.headers
            place = accepted.headers["location"]
            assert place == f"/admin/operations/{accepted.json()['id']}"
            early = await client.get(place, headers={"Prefer": "wait=0"})
            assert (early.status_code, early.json()["state"]) == (200, "pending")
            [laggard] = early.json()["lagging"]
            assert laggard["replica_id"] == stack.reconciler.replica_id
            stack.engine.gate.set()
            late = await client.get(place, headers={"Prefer": "respond-async, WAIT=20; x=y"})
            assert late.json()["state"] == "active"
            assert late.headers["preference-applied"] == "wait=20"
        is_problem(await client.get("/admin/operations/nothing"), 404, "operation-not-found")

    over_http(test)


def test_a_wait_ends_in_time(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        stack.engine.gate = asyncio.Event()
        headers = {"Prefer": "wait=1"}
        accepted = await client.post(URL, json=body(bundles, 0), headers=headers)
        assert (accepted.status_code, accepted.headers["preference-applied"]) == (202, "wait=1")
        stack.engine.gate.set()

    over_http(test)


def test_status_tells_everything(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        await client.post(URL, json=body(bundles, 0))
        status = (await client.get("/admin/status")).json()
        assert (status["status"], status["reason"]) == ("serving", None)
        assert (status["epoch"], status["head"]) == (1, 1)
        assert status["slots"] == {"total": 3, "used": 1}
        assert 0 < status["lease_left_s"] <= 10
        assert status["substrate"].startswith("sha256:")
        assert status["canary"]["num_sites"] == 8
        assert status["queue"] == {"pending": 0}

        stack.engine.is_trusted = False
        status = (await client.get("/admin/status")).json()
        assert status["status"] == "untrusted"
        assert status["reason"]

    over_http(test)


def test_the_fleet_lists_this_server(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        await client.post(URL, json=body(bundles, 0))
        fleet = (await client.get("/admin/fleet")).json()
        assert (fleet["head"], fleet["active_epoch"]) == (1, 1)
        [replica] = fleet["replicas"]
        assert replica["replica_id"] == stack.reconciler.replica_id
        assert (replica["is_self"], replica["state"], replica["lag"]) == (True, "serving", 0)
        assert (replica["applied_epoch"], replica["reason"]) == (1, None)
        assert replica["lease_left_s"] > 0

    over_http(test)


def test_errors_of_a_bundle_are_422(over_http: Any, tmp_path: Path) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        for bundle in (str(tmp_path / "none"), (tmp_path / "none").as_uri()):
            response = await client.post(URL, json={"name": "a", "bundle": bundle})
            problem = is_problem(response, 422, "bundle-not-found")
            assert {"expected", "got", "fix"} <= problem.keys()

    over_http(test)


@pytest.mark.parametrize(
    "bundle",
    [
        "relative/path",
        "file://host/x",
        "file:x",
        "",
        "/a\0b",
    ],
)
def test_other_places_of_a_bundle_are_refused(over_http: Any, bundle: str) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        response = await client.post(URL, json={"name": "a", "bundle": bundle})
        assert "absolute path" in is_problem(response, 422, "bundle-not-found")["expected"]

    over_http(test)


def test_a_file_uri_is_a_path(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        folder = bundles.experts["domain-0"]
        for name, uri in (("a", folder.as_uri()), ("a", f"file://localhost{folder}")):
            response = await client.post(URL, json={"name": name, "bundle": uri})
            assert response.is_success

    over_http(test)


def test_conflicts_are_409(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        for index, name in enumerate("abc"):
            assert (await client.post(URL, json=body(bundles, index, name))).status_code == 201
        taken = await client.post(URL, json=body(bundles, 0, "d"))
        is_problem(taken, 409, "domain-conflict")
        is_problem(await client.post(URL, json=body(bundles, 3, "d")), 409, "no-free-slot")

    over_http(test)


def test_unknown_and_unusable_names(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        is_problem(await client.get(f"{URL}/a"), 404, "domain-not-found")
        is_problem(await client.delete(f"{URL}/a"), 404, "domain-not-found")
        is_problem(await client.post(URL, json=body(bundles, 0, "A B")), 422, "domain-name")

    over_http(test)


def test_a_change_that_the_engine_refuses_stays_and_can_be_taken_back(
    over_http: Any, bundles: TinyBundles
) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        stack.engine.failure = SwitchError("no worker could copy")
        asked = await client.post(URL, json=body(bundles, 0), headers={"Prefer": "wait=1"})
        assert (asked.status_code, asked.json()["error"]) == (202, "switch")
        assert stack.reconciler.may_generate  # under the old epoch, which is not ended yet
        ready = await client.get("/health/ready")
        assert (ready.status_code, ready.json()["head"]) == (503, 1)
        stack.expire_lease()
        response = await client.post(URL, json=body(bundles, 0))
        problem = is_problem(response, 503, "switch")
        assert (problem["got"], stack.reconciler.may_generate) == ("switch", False)
        assert (await client.get("/admin/fleet")).json()["replicas"][0]["reason"] == "switch"
        # The engine goes on refusing, but there is nothing for it to do any more.
        revoked = await client.delete(f"{URL}/a")
        assert (revoked.status_code, revoked.json()["state"]) == (200, "active")
        await stack.until(lambda: stack.reconciler.is_ready)

    over_http(test)


def test_an_engine_that_cannot_be_trusted_fails_the_change(
    over_http: Any, bundles: TinyBundles
) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        stack.engine.break_down()
        problem = is_problem(await client.post(URL, json=body(bundles, 0)), 503, "switch")
        assert problem["got"] == "engine"
        live = await client.get("/health/live")
        assert (live.status_code, live.json()["status"]) == (503, "untrusted")

    over_http(test)


def test_requests_that_do_not_parse(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        json_type = {"content-type": "application/json"}
        is_problem(await client.post(URL, content=b"{", headers=json_type), 400, "malformed-json")
        for content in (
            {},
            {"name": 7, "bundle": "/x"},
            body(bundles, 0, more="secret text"),
            body(bundles, 0, in_flight="never"),
            ["a"],
        ):
            response = await client.post(URL, json=content)
            assert is_problem(response, 422, "invalid-request")["errors"]
            assert "secret text" not in response.text

    over_http(test)


def test_unknown_routes_and_methods_are_problems_too(over_http: Any) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        is_problem(await client.get("/admin/nothing"), 404, "not-found")
        is_problem(await client.get("/admin/"), 404, "not-found")
        is_problem(await client.get(f"{URL}/"), 404, "not-found")
        response = await client.put(URL, json={})
        is_problem(response, 405, "method-not-allowed")
        assert response.headers["allow"]

    over_http(test)


def test_an_unexpected_error_gives_nothing_away(over_http: Any) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        def fail() -> None:
            raise ValueError("secret text")

        stack.service.status = fail  # type: ignore[assignment,method-assign]
        response = await client.get("/admin/status")
        is_problem(response, 500, "internal")
        assert "secret text" not in response.text

    over_http(test)


def test_if_match_guards_a_change(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        await client.post(URL, json=body(bundles, 0))
        for tag in ('"0"', 'W/"1"', '"0", "2"', '""'):
            refused = await client.delete(f"{URL}/a", headers={"If-Match": tag})
            is_problem(refused, 412, "precondition-failed")
            assert refused.headers["etag"] == '"1"'
        for tag in ("1", '"1', "*, *", ""):
            refused = await client.delete(f"{URL}/a", headers={"If-Match": tag})
            is_problem(refused, 400, "malformed-header")
        assert stack.service.epoch == 1
        done = await client.post(URL, json=body(bundles, 1), headers={"If-Match": '"0", "1"'})
        assert done.headers["etag"] == '"2"'
        assert (await client.delete(f"{URL}/a", headers={"If-Match": "*"})).is_success
        refused = await client.post(URL, json=body(bundles, 1), headers={"If-Match": "*"})
        is_problem(refused, 412, "precondition-failed")

    over_http(test)


def test_if_none_match_star_only_creates(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        only_new = {"If-None-Match": "*"}
        assert (await client.post(URL, json=body(bundles, 0), headers=only_new)).status_code == 201
        for index in (0, 1):
            refused = await client.post(URL, json=body(bundles, index), headers=only_new)
            is_problem(refused, 412, "precondition-failed")
        assert stack.service.epoch == 1

    over_http(test)


def test_conditions_are_judged_when_it_is_the_requests_turn(
    over_http: Any, bundles: TinyBundles
) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        answers = await asyncio.gather(
            *(
                client.post(URL, json=body(bundles, i, f"d{i}"), headers={"If-Match": '"0"'})
                for i in range(3)
            )
        )
        assert sorted(a.status_code for a in answers) == [201, 412, 412]

    over_http(test)


def test_a_change_without_a_condition_is_refused_where_one_is_demanded(
    make_stack: Any, bundles: TinyBundles
) -> None:
    async def run() -> None:
        stack = await make_stack(requires_if_match=True)
        async with stack.client() as client:
            for refused in (
                await client.post(URL, json=body(bundles, 0)),
                await client.delete(f"{URL}/a"),
            ):
                is_problem(refused, 428, "precondition-required")
            only_new = {"If-None-Match": "*"}
            created = await client.post(URL, json=body(bundles, 0), headers=only_new)
            assert created.status_code == 201
            seen = {"If-Match": created.headers["etag"]}
            assert (await client.delete(f"{URL}/a", headers=seen)).status_code == 200

    asyncio.run(run())


def test_a_key_is_done_once_and_replayed(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        key = {"Idempotency-Key": "k1"}
        first = await client.post(URL, json=body(bundles, 0), headers=key)
        replayed = await client.post(URL, json=body(bundles, 0), headers=key)
        assert replayed.status_code == 201
        assert replayed.content == first.content
        assert replayed.headers["etag"] == first.headers["etag"]
        assert replayed.headers["location"] == first.headers["location"]
        assert replayed.headers["idempotency-replayed"] == "true"
        assert "idempotency-replayed" not in first.headers
        await client.delete(f"{URL}/a")
        late = await client.post(URL, json=body(bundles, 0), headers=key)
        assert (late.json()["id"], late.json()["outcome"]) == (first.json()["id"], "created")
        # A condition that no longer holds is not asked of what has been done.
        late = await client.post(URL, json=body(bundles, 0), headers=key | {"If-Match": '"0"'})
        assert late.status_code == 201
        assert stack.service.list() == ()

        other = await client.post(URL, json=body(bundles, 1), headers=key)
        is_problem(other, 409, "idempotency-conflict")
        is_problem(await client.delete(f"{URL}/a", headers=key), 409, "idempotency-conflict")
        empty = await client.delete(f"{URL}/a", headers={"Idempotency-Key": "k" * 256})
        is_problem(empty, 400, "malformed-header")

    over_http(test)


def test_repetitions_at_once_are_one_change(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        key = {"Idempotency-Key": "k1"}
        answers = await asyncio.gather(
            *(client.post(URL, json=body(bundles, 0), headers=key) for _ in range(3))
        )
        assert [a.status_code for a in answers] == [201, 201, 201]
        assert len({a.json()["id"] for a in answers}) == 1
        assert len(stack.engine.switches) == 1

    over_http(test)


def test_a_refused_request_may_use_its_key_again(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        key = {"Idempotency-Key": "k1"}
        missing = body(bundles, 0) | {"bundle": "/nowhere"}
        is_problem(await client.post(URL, json=missing, headers=key), 422, "bundle-source")
        assert (await client.post(URL, json=body(bundles, 0), headers=key)).status_code == 201

    over_http(test)


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic Y29ycmVjdC1ob3JzZQ==", "correct-horse"],
)
@pytest.mark.parametrize("path", [URL, "/admin/status", "/admin/nothing", f"{URL}/%0A"])
def test_without_the_token_nothing_is_answered(
    over_http: Any, authorization: str | None, path: str
) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        client.headers.pop("authorization")
        headers = {} if authorization is None else {"Authorization": authorization}
        response = await client.post(path, content=b"{", headers=headers)
        is_problem(response, 401, "unauthorized")
        assert response.headers["www-authenticate"].startswith("Bearer")

    over_http(test)


def test_a_server_without_token_is_closed(make_stack: Any) -> None:
    async def run() -> None:
        stack = await make_stack(token=None)
        async with stack.client() as client:
            for path in (URL, "/admin/status", "/admin/nothing"):
                problem = is_problem(await client.get(path), 403, "admin-closed")
                for way in (
                    "ALTER_ADMIN_TOKEN,",
                    "ALTER_ADMIN_TOKEN_FILE",
                    "--alter-admin-token-file",
                ):
                    assert way in problem["fix"]

    asyncio.run(run())


def test_openapi_describes_the_admin_side_with_examples(over_http: Any) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        schema = (await client.get("/openapi.json")).json()
        assert {"post", "get"} == set(schema["paths"][URL])
        assert set(schema["paths"][URL + "/{name}"]) == {"get", "delete"}
        for path in ("/v1/stream", "/health/live", "/health/ready", "/admin/fleet"):
            assert path in schema["paths"]
        schemas = schema["components"]["schemas"]
        for name in ("ActivateRequest", "Operation", "Fleet", "ForgetDomain", "Problem", "Status"):
            assert schemas[name]["examples"]
        post = schema["paths"][URL]["post"]
        assert "application/problem+json" in post["responses"]["409"]["content"]
        parameters = {p["name"].lower() for p in post["parameters"]}
        assert parameters == {"if-match", "if-none-match", "idempotency-key", "prefer"}

    over_http(test)


def error_classes(base: type[AlterError]) -> list[type[AlterError]]:
    return [base, *(c for sub in base.__subclasses__() for c in error_classes(sub))]


def test_every_error_has_its_own_problem_type() -> None:
    classes = [c for c in error_classes(AlterError) if c.__module__ == errors.__name__]
    kinds = [problem_kind(c) for c in classes]
    assert len(set(kinds)) == len(kinds)
    for error_class in classes:
        problem = problem_of(error_class("what", expected="e", got="g", fix="f"))
        assert (problem.detail, problem.expected, problem.got, problem.fix) == (
            "what",
            "e",
            "g",
            "f",
        )
        assert problem.status in (404, 409, 412, 422, 500, 503)
