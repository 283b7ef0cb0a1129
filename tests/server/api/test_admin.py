"""HTTP semantics of /admin: statuses, problems, conditions, idempotency, authentication."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.routing import Mount

from alter_core import errors
from alter_core.errors import AlterError, SwitchError, problem_kind
from server.api.idempotency import IdempotencyStore
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
        answer = created.json()
        assert answer["outcome"] == "created"
        assert answer["switch"] == {
            "epoch": 1,
            "stage_s": 0.02,
            "pause_s": 0.03,
            "kept_requests": 5,
            "recomputed_requests": 2,
            "recomputed_tokens": 130,
        }
        assert answer["digest"].startswith("sha256:")
        assert answer["evaluation"] == {"forget_probability": 0.01}

        again = await client.post(URL, json=body(bundles, 0))
        assert (again.status_code, again.json()["outcome"]) == (200, "unchanged")
        assert again.json()["switch"] is None
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
        assert revoked.json()["switch"]["epoch"] == 3
        assert (await client.get(URL)).json() == {"epoch": 3, "domains": []}

    over_http(test)


def test_status_tells_everything(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        await client.post(URL, json=body(bundles, 0))
        status = (await client.get("/admin/status")).json()
        assert status["status"] == "serving"
        assert (status["epoch"], status["slots"]) == (1, {"total": 3, "used": 1})
        assert status["substrate"].startswith("sha256:")
        assert status["canary"]["num_sites"] == 8
        assert status["queue"] == {"pending": 0}

        stack.engine.is_trusted = False
        status = (await client.get("/admin/status")).json()
        assert status["status"] == "untrusted"
        assert status["reason"]

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
        "s3://bucket/expert",
        "https://host/x",
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
            assert response.json()["bundle"] == str(folder)

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


def test_failures_of_the_engine_are_503(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        stack.engine.failure = SwitchError("no worker could copy", fix="Free some memory.")
        response = await client.post(URL, json=body(bundles, 0))
        assert is_problem(response, 503, "switch")["fix"] == "Free some memory."
        stack.engine.break_down()
        is_problem(await client.post(URL, json=body(bundles, 0)), 503, "engine")
        response = await client.post(URL, json=body(bundles, 0))
        assert "Restart" in is_problem(response, 503, "engine")["fix"]

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


def test_a_key_is_done_once_and_replayed(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        key = {"Idempotency-Key": "k1"}
        first = await client.post(URL, json=body(bundles, 0), headers=key)
        await client.delete(f"{URL}/a")
        replayed = await client.post(URL, json=body(bundles, 0), headers=key)
        assert replayed.status_code == 201
        assert replayed.content == first.content
        assert replayed.headers["etag"] == first.headers["etag"]
        assert replayed.headers["location"] == first.headers["location"]
        assert replayed.headers["content-type"] == "application/json"
        assert replayed.headers["idempotency-replayed"] == "true"
        assert "idempotency-replayed" not in first.headers
        assert stack.service.list() == ()

        other = await client.post(URL, json=body(bundles, 1), headers=key)
        is_problem(other, 422, "idempotency-key-reused")
        is_problem(await client.delete(f"{URL}/a", headers=key), 422, "idempotency-key-reused")
        empty = await client.delete(f"{URL}/a", headers={"Idempotency-Key": "k" * 256})
        is_problem(empty, 400, "malformed-header")

    over_http(test)


def test_a_repetition_waits_for_the_first(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        key = {"Idempotency-Key": "k1"}
        answers = await asyncio.gather(
            *(client.post(URL, json=body(bundles, 0), headers=key) for _ in range(3))
        )
        assert [a.status_code for a in answers] == [201, 201, 201]
        assert len(stack.engine.switches) == 1

    over_http(test)


def test_a_refused_request_may_use_its_key_again(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        key = {"Idempotency-Key": "k1"}
        stack.engine.failure = SwitchError("no worker could copy")
        is_problem(await client.post(URL, json=body(bundles, 0), headers=key), 503, "switch")
        stack.engine.failure = None
        assert (await client.post(URL, json=body(bundles, 0), headers=key)).status_code == 201

    over_http(test)


def test_the_oldest_keys_are_forgotten(over_http: Any, bundles: TinyBundles) -> None:
    async def test(stack: Stack, client: httpx.AsyncClient) -> None:
        mounts = [r for r in stack.app.routes if isinstance(r, Mount) and r.path == "/admin"]
        admin: Any = mounts[0]._base_app
        admin.state.idempotency = IdempotencyStore(max_keys=2)
        for index in range(3):
            key = {"Idempotency-Key": f"k{index}"}
            await client.post(URL, json=body(bundles, 0), headers=key)
        for index, is_replayed in ((2, True), (1, True), (0, False)):
            key = {"Idempotency-Key": f"k{index}"}
            response = await client.post(URL, json=body(bundles, 0), headers=key)
            assert ("idempotency-replayed" in response.headers) == is_replayed

    over_http(test)


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic Y29ycmVjdC1ob3JzZQ==", "correct-horse"],
)
@pytest.mark.parametrize("path", [URL, "/admin/status", "/admin/nothing"])
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
        assert "/v1/stream" in schema["paths"]
        schemas = schema["components"]["schemas"]
        for name in ("ActivateRequest", "Activated", "ForgetDomain", "Problem", "Status"):
            assert schemas[name]["examples"]
        post = schema["paths"][URL]["post"]
        assert "application/problem+json" in post["responses"]["409"]["content"]
        parameters = {p["name"].lower() for p in post["parameters"]}
        assert parameters == {"if-match", "if-none-match", "idempotency-key"}

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
