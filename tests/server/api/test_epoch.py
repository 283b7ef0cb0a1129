"""The epoch on answers and streams, and the refusal to generate without trust."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, WebSocket

from alter_core.errors import RegistryUnavailableError, SwitchError
from server.api.app import attach
from server.api.middleware import is_always_open, route_path
from tests.support.tiny import TinyBundles

from .conftest import AUTHORIZATION, WAITING, Listening, Stack

STREAM = "/v1/stream"
ADMIN = "/admin/forget-domains"


def activate(listening: Listening, bundles: TinyBundles, index: int) -> None:
    folder = str(bundles.experts[f"domain-{index}"])
    response = httpx.post(
        listening.url + ADMIN, json={"name": f"d{index}", "bundle": folder}, headers=WAITING
    )
    assert response.status_code == 201, response.text


def test_every_v1_answer_carries_the_epoch(make_stack: Any, bundles: TinyBundles) -> None:
    async def run() -> None:
        stack: Stack = await make_stack()
        stack.steps[0].set()
        async with stack.client() as client:
            for epoch in ("0", "1"):
                for path in ("/v1/wait", "/v1/chat/completions", "/v1/models"):
                    response = await client.post(path)
                    assert response.headers["x-alter-epoch"] == epoch
                    assert "x-alter-epoch-final" not in response.headers
                assert "x-alter-epoch" not in (await client.get("/version")).headers
                await stack.activate("a", bundles.experts["domain-0"])

    asyncio.run(run())


def test_an_answer_that_spans_a_switch_names_both_epochs(
    make_stack: Any, bundles: TinyBundles
) -> None:
    async def run() -> None:
        stack: Stack = await make_stack()
        async with stack.client() as client:
            waiting = asyncio.create_task(client.post("/v1/wait"))
            await asyncio.sleep(0.05)
            await stack.activate("a", bundles.experts["domain-0"])
            stack.steps[0].set()
            response = await waiting
        assert response.json() == {"text": "done"}
        assert response.headers["x-alter-epoch"] == "0"
        assert response.headers["x-alter-epoch-final"] == "1"

    asyncio.run(run())


def test_a_stream_says_where_a_switch_fell(listening: Listening, bundles: TinyBundles) -> None:
    def step(index: int) -> None:
        listening.call(listening.stack.steps[index].set)

    received: list[str] = []
    with httpx.stream("POST", listening.url + STREAM, timeout=20) as response:
        assert response.headers["x-alter-epoch"] == "0"
        chunks = response.iter_text()
        step(0)
        # Not buffered: the first event is here before the second is generated.
        received.append(next(chunks))
        activate(listening, bundles, 0)
        activate(listening, bundles, 1)
        step(1)
        received.append(next(chunks))
        listening.run(listening.stack.revoke("d0"))
        step(2)
        received.extend(chunks)
    assert "".join(received) == (
        "data: 0\n\n"
        ": alter-epoch 0 -> 2\n\ndata: 1\n\n"
        ": alter-epoch 2 -> 3\n\ndata: 2\n\n"
        "data: [DONE]\n\n"
    )


def test_a_switch_before_the_first_event_is_announced_with_it(
    listening: Listening, bundles: TinyBundles
) -> None:
    with httpx.stream("POST", listening.url + STREAM, timeout=20) as response:
        activate(listening, bundles, 0)
        for event in listening.stack.steps:
            listening.call(event.set)
        assert response.read().startswith(b": alter-epoch 0 -> 1\n\ndata: 0\n\n")
        assert "x-alter-epoch-final" not in response.headers


def break_down(listening: Listening, bundles: TinyBundles) -> None:
    listening.call(listening.stack.engine.break_down)
    folder = str(bundles.experts["domain-3"])
    body = {"name": "broken", "bundle": folder}
    response = httpx.post(listening.url + ADMIN, json=body, headers=WAITING)
    assert response.status_code == 503


def test_running_streams_are_cut_when_trust_is_lost(
    listening: Listening, bundles: TinyBundles
) -> None:
    with httpx.stream("POST", listening.url + STREAM, timeout=20) as response:
        chunks = response.iter_text()
        listening.call(listening.stack.steps[0].set)
        assert next(chunks) == "data: 0\n\n"
        # The stream waits for its next event, and is cut nevertheless.
        break_down(listening, bundles)
        with pytest.raises(httpx.RemoteProtocolError):
            list(chunks)


def test_waiting_requests_are_answered_when_trust_is_lost(
    make_stack: Any, bundles: TinyBundles
) -> None:
    async def run() -> None:
        stack: Stack = await make_stack()
        async with stack.client() as client:
            waiting = asyncio.create_task(client.post("/v1/wait"))
            await asyncio.sleep(0.05)
            stack.engine.break_down()
            assert (await stack.activate("a", bundles.experts["domain-0"])).state == "failed"
            response = await asyncio.wait_for(waiting, 5)
        assert response.status_code == 503
        assert response.json()["error"]["type"] == "ServiceUnavailableError"

    asyncio.run(run())


def test_an_engine_that_lost_its_trust_by_itself_cuts_at_the_next_event(
    listening: Listening,
) -> None:
    with httpx.stream("POST", listening.url + STREAM, timeout=20) as response:
        chunks = response.iter_text()
        listening.call(listening.stack.steps[0].set)
        assert next(chunks) == "data: 0\n\n"
        listening.stack.engine.is_trusted = False
        listening.call(listening.stack.steps[1].set)
        with pytest.raises(httpx.RemoteProtocolError):
            list(chunks)


def test_a_request_that_meets_a_lost_trust_ends_the_others(make_stack: Any) -> None:
    async def run() -> None:
        stack: Stack = await make_stack()
        async with stack.client() as client:
            waiting = asyncio.create_task(client.post("/v1/wait"))
            await asyncio.sleep(0.05)
            stack.engine.is_trusted = False
            assert (await client.post("/v1/completions")).status_code == 503
            assert (await asyncio.wait_for(waiting, 5)).status_code == 503
        assert not stack.service.is_trusted
        stack.engine.is_trusted = True
        assert not stack.service.is_trusted

    asyncio.run(run())


def test_a_rollback_under_way_refuses_but_cuts_nobody(
    make_stack: Any, bundles: TinyBundles
) -> None:
    async def run() -> None:
        stack: Stack = await make_stack()
        async with stack.client() as client:
            waiting = asyncio.create_task(client.post("/v1/wait"))
            stack.engine.gate = asyncio.Event()
            stack.engine.failure = SwitchError("rolled back")
            asked = await stack.operations.activate("a", bundles.experts["domain-0"])
            while not stack.engine.switches:
                await asyncio.sleep(0.01)
            stack.engine.is_trusted = False
            assert (await client.post("/v1/completions")).status_code == 503
            stack.engine.is_trusted = True
            stack.engine.gate.set()
            await stack.until(lambda: stack.reconciler.error == "switch")
            assert (await stack.operations.wait(asked, 0)).state == "pending"
            stack.steps[0].set()
            assert (await waiting).status_code == 200
            assert (await client.post("/v1/completions")).status_code == 200

    asyncio.run(run())


@pytest.mark.parametrize("is_ready", [True, False])
def test_without_trust_nothing_is_generated(make_stack: Any, is_ready: bool) -> None:
    closed = (
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models/../completions",
        "/inference/v1/generate",
        "/generate",
        "/pooling",
        "/score",
        "/v2/embed",
        "/cohere/v2/chat",
        "/invocations",
        "/adminx",
        "/health",
        "/ping",
        "/metricsx",
        "/",
    )
    still_open = ("/metrics", "/version", "/v1/models", "/load", "/docs")

    async def run() -> None:
        stack: Stack = await make_stack()
        if is_ready:
            stack.engine.is_trusted = False
        else:
            stack.service._canary = None
        async with stack.client() as client:
            for path in closed:
                response = await client.post(path)
                assert response.status_code == 503, path
                assert response.headers["retry-after"] == "30"
                assert response.headers["x-alter-epoch"] == "0"
                error = response.json()["error"]
                assert (error["code"], error["param"]) == (503, None)
                assert set(error) == {"message", "type", "param", "code"}
            for path in still_open:
                assert (await client.get(path)).status_code == 200, path
            assert (await client.get("/admin/status")).status_code == 200

    asyncio.run(run())


def test_without_a_lease_nothing_is_generated_until_there_is_one_again(
    make_stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> None:
        stack: Stack = await make_stack()
        async with stack.client() as client:
            waiting = asyncio.create_task(client.post("/v1/wait"))
            await asyncio.sleep(0.05)
            cut_off(stack, monkeypatch)
            stack.expire_lease()
            response = await client.post("/v1/completions")
            assert (response.status_code, response.headers["retry-after"]) == (503, "5")
            # The running request is cut although it sends nothing.
            stack.reconciler._end_generation()
            assert (await asyncio.wait_for(waiting, 5)).status_code == 503
            for path, status in (
                ("/health", 200), ("/ping", 200), ("/health/live", 200), ("/health/ready", 503),
                ("/v1/models", 200), ("/metrics", 200),
            ):  # fmt: skip
                assert (await client.get(path)).status_code == status, path
            await stack.until(lambda: stack.reconciler.error == "registry-unavailable")
            assert (await client.get("/admin/status")).json()["status"] == "waiting"
            assert (await client.get("/admin/forget-domains")).status_code == 200
            assert (await client.get("/admin/fleet")).status_code == 503
            monkeypatch.undo()
            await stack.until(lambda: stack.reconciler.is_ready)
            assert (await client.post("/v1/completions")).status_code == 200
            assert (await client.get("/health/ready")).json() == {"status": "ready", "epoch": 0}

    asyncio.run(run())


def cut_off(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """No transaction with the registry succeeds any more."""

    @contextlib.contextmanager
    def fail() -> Iterator[None]:
        raise RegistryUnavailableError("The registry did not carry out a transaction")
        yield

    for kind in ("read", "write"):
        monkeypatch.setattr(stack.parts.registry._database, kind, fail)


def test_before_there_is_a_service_everything_is_refused() -> None:
    async def run() -> None:
        app = FastAPI()
        attach(app)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://alter") as client:
            response = await client.post("/v1/completions")
            assert response.status_code == 503
            assert "x-alter-epoch" not in response.headers
            assert (await client.get("/admin/status")).status_code == 403

    asyncio.run(run())


def test_a_client_that_disconnects_leaves_no_half_change(
    listening: Listening, bundles: TinyBundles
) -> None:
    stack = listening.stack
    gate: asyncio.Event = listening.call(asyncio.Event)
    stack.engine.gate = gate
    body = {"name": "a", "bundle": str(bundles.experts["domain-0"])}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            listening.url + ADMIN,
            json=body,
            headers=WAITING,
            timeout=httpx.Timeout(10, read=0.5),
        )
    assert len(stack.engine.switches) == 1
    listening.call(gate.set)
    listening.run(stack.until(lambda: stack.service.epoch == 1))
    response = httpx.get(f"{listening.url}{ADMIN}/a", headers=AUTHORIZATION)
    assert response.json()["epoch"] == 1


def test_a_scrape_first_collects_the_counts(make_stack: Any) -> None:
    async def run() -> None:
        stack: Stack = await make_stack()
        stack.engine.counts[None] = (1, 41)
        async with stack.client() as client:
            assert (await client.get("/metrics")).status_code == 200
        assert stack.service.routed_tokens("retain").low == 41

    asyncio.run(run())


def test_a_cancellation_from_elsewhere_goes_through(make_stack: Any) -> None:
    async def run() -> None:
        stack: Stack = await make_stack()
        async with stack.client() as client:
            waiting = asyncio.create_task(client.post("/v1/wait"))
            await asyncio.sleep(0.05)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(run())


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("/v1/models", "", "/v1/models"),
        ("/proxy/v1/models", "/proxy", "/v1/models"),
        ("/proxyv1/models", "/proxy", "/proxyv1/models"),
        ("/v1/models", "/proxy", "/v1/models"),
        ("/proxy", "/proxy", ""),
    ],
)
def test_the_root_path_is_taken_off_as_the_router_does(path: str, root: str, expected: str) -> None:
    assert route_path({"path": path, "root_path": root}) == expected
    assert not is_always_open("")


class Websocket:
    """The server's side of one websocket, driven by hand."""

    def __init__(self) -> None:
        self.to_app: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.sent: list[dict[str, Any]] = []

    async def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.fixture
def websocket_app() -> FastAPI:
    app = FastAPI()

    @app.websocket("/v1/realtime")
    async def realtime(websocket: WebSocket) -> None:
        await websocket.accept()
        while True:
            await websocket.send_text(await websocket.receive_text())

    return app


def test_websockets_are_refused_and_cut(
    make_stack: Callable[..., Any], websocket_app: FastAPI
) -> None:
    async def run() -> None:
        stack: Stack = await make_stack()
        runtime = attach(websocket_app)
        runtime.open(stack.parts, None)
        scope = {
            "type": "websocket",
            "path": "/v1/realtime",
            "headers": [],
            "query_string": b"",
            "subprotocols": [],
        }
        peer = Websocket()
        serving = asyncio.create_task(websocket_app(dict(scope), peer.to_app.get, peer.send))
        await peer.to_app.put({"type": "websocket.connect"})
        await peer.to_app.put({"type": "websocket.receive", "text": "hello"})
        await asyncio.sleep(0.05)
        assert [m["type"] for m in peer.sent] == ["websocket.accept", "websocket.send"]
        assert (b"x-alter-epoch", b"0") in peer.sent[0]["headers"]
        stack.engine.is_trusted = False
        runtime.cut_all()
        await asyncio.wait_for(serving, 5)
        assert peer.sent[-1] == {"type": "websocket.close", "code": 1013}

        late = Websocket()
        await websocket_app(dict(scope), late.to_app.get, late.send)
        assert [m["type"] for m in late.sent] == ["websocket.close"]

    asyncio.run(run())
