"""The HTTP side over an in-memory `ForgetEngine`: no vLLM, and no claim about generation.

Bundles are real and on disk; streams and disconnects go over a real uvicorn socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse

from alter_core.errors import EngineError
from alter_core.substrate import Substrate
from server.api.app import attach
from server.api.runtime import AlterRuntime
from server.audit import AuditLog
from server.domains import DomainService
from server.engine.base import (
    CanaryReport,
    EngineState,
    InFlight,
    RoutedTokens,
    SwitchReport,
    Trace,
    TracedToken,
)
from server.lease import boot_clock
from server.metrics import AlterMetrics
from server.operations import Operation, OperationService
from server.parts import Parts, deployment_of, request_service
from server.reconciler import Reconciler
from server.registry import BundleStore, ImportPolicy, Registry
from server.requests import jobs
from server.requests import service as service_module
from server.requests.jobs import LocalJobs
from server.requests.settings import RequestSettings
from server.settings import token_digest
from server.tokens import TokenStore
from server.tracing import NO_TRACING, Tracing
from tests.support.tiny import PROVENANCE, TinyBundles, make_bundles, random_expert
from tests.support.words import Words

from .request_plans import figures

MAX_DOMAINS = 3
TOKEN = "correct-horse"
AUTHORIZATION = {"Authorization": f"Bearer {TOKEN}"}
WAITING = AUTHORIZATION | {"Prefer": "wait=20"}
WAIT_S = 20.0


class InMemoryEngine:
    """A `ForgetEngine` that only keeps books. Tests set `failure` and `lie`."""

    def __init__(self, max_domains: int) -> None:
        self.is_trusted = True
        self.epoch = 0
        self.digests: list[str | None] = [None] * max_domains
        self.counts: dict[int | None, tuple[int, int]] = {None: (0, 0)}
        self.failure: Exception | None = None
        self.lie: EngineState | None = None
        self.gate: asyncio.Event | None = None
        """If set, a switch waits for it."""
        self.switches: list[dict[str, Any]] = []
        self.traced: list[EngineState] = []
        """What the next traces were computed with, as if a switch came after them."""

    async def switch(
        self,
        *,
        epoch: int,
        slot: int,
        bundle: Path | None,
        digest: str | None,
        in_flight: InFlight = "recompute",
    ) -> SwitchReport:
        self.switches.append({"slot": slot, "digest": digest, "in_flight": in_flight})
        await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.epoch, self.digests[slot] = epoch, digest
        self.counts.pop(slot, None)
        if digest is not None:
            self.counts[slot] = (0, 0)
        return SwitchReport(
            epoch=epoch,
            stage_s=0.02,
            pause_s=0.03,
            kept_requests=5,
            recomputed_requests=2,
            recomputed_tokens=130,
        )

    async def state(self) -> EngineState:
        return self.lie or EngineState(epoch=self.epoch, digests=tuple(self.digests))

    async def routed_tokens(self) -> list[RoutedTokens]:
        return [RoutedTokens(slot=s, high=h, low=low) for s, (h, low) in self.counts.items()]

    async def trace(self, token_ids: Sequence[int]) -> Trace:
        slots = [slot for slot, digest in enumerate(self.digests) if digest is not None]
        tokens = tuple(
            TracedToken(
                token_id=token_id,
                entropy=token_id / 10,
                is_high=token_id > 5,
                weights=tuple((slot, 0.5) for slot in (None, *slots)),
            )
            for token_id in token_ids
        )
        return Trace(state=self.traced.pop(0) if self.traced else await self.state(), tokens=tokens)

    async def run_canary(self) -> CanaryReport:
        return CanaryReport(num_sites=8, min_logit_change=1.5, seconds=0.1)

    def break_down(self) -> None:
        """The next switch leaves nobody knowing what is applied."""
        self.failure = EngineError("The switch failed and could not be undone")


class Clock:
    """The machine's, and whatever `advance` adds."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return boot_clock() + self.ahead_s

    def advance(self, seconds: float) -> None:
        self.ahead_s += seconds


@dataclasses.dataclass
class Replica:
    """One server without HTTP."""

    parts: Parts
    engine: InMemoryEngine
    clock: Clock

    @property
    def service(self) -> DomainService:
        return self.parts.service

    @property
    def reconciler(self) -> Reconciler:
        return self.parts.reconciler

    @property
    def operations(self) -> OperationService:
        return self.parts.operations

    async def activate(self, name: str, bundle: Path, *options: Any, **more: Any) -> Operation:
        """Asks for it and waits until it is settled."""
        asked = await self.operations.activate(name, bundle, *options, **more)
        return await self.operations.wait(asked, WAIT_S)

    async def revoke(self, name: str, **options: Any) -> Operation:
        """Asks for it and waits until it is settled."""
        return await self.operations.wait(await self.operations.revoke(name, **options), WAIT_S)

    def expire_lease(self) -> None:
        """As if nothing had been heard of the registry for as long as the lease lasts."""
        self.clock.advance(self.parts.registry.lease_s)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for a condition on this server."""
        async with asyncio.timeout(WAIT_S):
            while not condition():
                await asyncio.sleep(0.01)


class Site:
    """Where the servers of one deployment meet. `close` it."""

    def __init__(self, folder: Path, substrate: Substrate) -> None:
        self.folder = folder
        self.substrate = substrate
        self.url = f"sqlite:///{folder / 'registry.sqlite'}"
        self.store = folder / "bundles"
        self._stack = contextlib.ExitStack()

    def registry(self, **options: Any) -> Registry:
        """Opened as one more server would."""
        settings = {"max_domains": MAX_DOMAINS, "poll_s": 0.05}
        registry = Registry.open(self.url, deployment_of(self.substrate), **(settings | options))
        self._stack.callback(registry.close)
        return registry

    def replica(
        self,
        *,
        engine: InMemoryEngine | None = None,
        audit_log: AuditLog | None = None,
        metrics: AlterMetrics | None = None,
        tracing: Tracing = NO_TRACING,
        **options: Any,
    ) -> Replica:
        """A server that has not started. To be called on its event loop."""
        clock, engine = Clock(), engine or InMemoryEngine(MAX_DOMAINS)
        parts = Parts.over(
            engine,
            self.substrate,
            self.registry(**options),
            BundleStore(str(self.store)),
            self.folder / "cache",
            max_domains=MAX_DOMAINS,
            audit_log=audit_log,
            metrics=metrics,
            tracing=tracing,
            clock=clock,
        )
        return Replica(parts, engine, clock)

    def close(self) -> None:
        self._stack.close()


@dataclasses.dataclass
class Stack(Replica):
    """One application with everything behind it."""

    app: FastAPI
    runtime: AlterRuntime
    steps: list[asyncio.Event]
    """`/v1/stream` sends event i once step i is set; `/v1/wait` answers at step 0."""

    def client(self, **headers: str) -> httpx.AsyncClient:
        """An HTTP client straight into the application, with the admin token; it waits for changes."""
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app, raise_app_exceptions=False),
            base_url="http://alter",
            headers=WAITING | headers,
            timeout=30,
        )


@pytest.fixture
def site(tmp_path: Path, substrate: Substrate) -> Iterator[Site]:
    made = Site(tmp_path, substrate)
    with contextlib.closing(made):
        yield made


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> TinyBundles:
    """Experts `domain-0` to `domain-3`: one more than there are slots."""
    return make_bundles(tmp_path_factory.mktemp("api"), num_experts=MAX_DOMAINS + 1)


@pytest.fixture(scope="session")
def substrate(bundles: TinyBundles) -> Substrate:
    return Substrate.read(bundles.substrate)


@pytest.fixture(scope="session")
def write_expert(
    substrate: Substrate, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Writes one more expert, with a given evaluation."""

    def write(evaluation: dict[str, Any]) -> Path:
        folder = tmp_path_factory.mktemp("expert") / "bundle"
        expert = random_expert(substrate, "extra", seed=99)
        expert.write(folder, substrate, training=PROVENANCE, evaluation=evaluation)
        return folder

    return write


@pytest.fixture
def plan(
    monkeypatch: pytest.MonkeyPatch, bundles: TinyBundles, tmp_path: Path
) -> Iterator[Callable[..., None]]:
    """Sets what jobs that start from now on do. None is left at the end."""

    def set_plan(expert: str = "domain-0", **fields: Any) -> None:
        chosen = {"bundle": str(bundles.experts[expert]), "figures": figures()} | fields
        monkeypatch.setenv("ALTER_TEST_JOB", json.dumps(chosen))

    monkeypatch.setattr(jobs, "MODULE", "tests.support.scripted_job")
    monkeypatch.setattr(service_module, "POLL_S", 0.02)
    monkeypatch.setattr(service_module, "IDLE_POLL_S", 0.02)
    monkeypatch.setattr(service_module, "WATCH_S", 0.01)
    set_plan()
    yield set_plan
    for lock in tmp_path.glob("work/requests/*/job/lock"):
        if holder := jobs._holder(lock.parent):
            os.killpg(holder, signal.SIGKILL)


def generating_app(steps: list[asyncio.Event]) -> FastAPI:
    """Routes that stand where vLLM's stand."""
    app = FastAPI()

    async def events() -> AsyncIterator[bytes]:
        for index, step in enumerate(steps):
            await step.wait()
            yield f"data: {index}\n\n".encode()
        yield b"data: [DONE]\n\n"

    @app.post("/v1/stream")
    async def stream() -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    @app.post("/v1/wait")
    async def wait() -> JSONResponse:
        await steps[0].wait()
        return JSONResponse({"text": "done"})

    @app.api_route("/{path:path}", methods=["GET", "POST"], include_in_schema=False)
    async def anything(request: Request, path: str) -> JSONResponse:
        return JSONResponse({"path": path})

    return app


@pytest.fixture
def make_stack(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Builds a stack inside a running loop."""

    async def build(
        *,
        num_steps: int = 3,
        token: str | None = TOKEN,
        tokens: TokenStore | None = None,
        audit_log: AuditLog | None = None,
        requires_if_match: bool = False,
        requests: RequestSettings | None = None,
        max_upload_bytes: int = 2**20,
        tracing: Tracing = NO_TRACING,
    ) -> Stack:
        steps = [asyncio.Event() for _ in range(num_steps)]
        app = generating_app(steps)
        catch_all = app.router.routes.pop()
        runtime = attach(app)
        app.router.routes.append(catch_all)
        replica = site.replica(audit_log=audit_log, tracing=tracing)
        service = None
        if requests is not None:
            service = request_service(
                replica.parts,
                requests,
                site.folder / "work",
                LocalJobs(1),
                model=site.folder,
                substrate=site.folder,
            )
        runtime.open(
            replica.parts,
            None if token is None else token_digest(token),
            tokens=tokens,
            audit=audit_log,
            requires_if_match=requires_if_match,
            sources=ImportPolicy(folders=(tmp_path_factory.getbasetemp(),)),
            prompts=Words(),
            writer=Words(),
            requests=service,
            max_upload_bytes=max_upload_bytes,
        )
        await replica.parts.start({})
        if service is not None:
            service.start()
        return Stack(replica.parts, replica.engine, replica.clock, app, runtime, steps)

    return build


class Listening:
    """A stack behind a real socket, on a loop of its own."""

    def __init__(self, make_stack: Callable[..., Any]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.stack: Stack = self.run(make_stack())
        config = uvicorn.Config(
            self.stack.app, host="127.0.0.1", port=0, log_level="critical", lifespan="off"
        )
        self._server = uvicorn.Server(config)
        self._serving = asyncio.run_coroutine_threadsafe(self._server.serve(), self._loop)
        deadline = time.monotonic() + 10
        while not self._server.started:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"

    def run(self, coroutine: Any) -> Any:
        """Runs a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def call(self, function: Callable[[], Any]) -> Any:
        """Calls a function on the server's loop."""

        async def called() -> Any:
            return function()

        return self.run(called())

    def close(self) -> None:
        self._server.should_exit = True
        self._serving.result(20)

        async def stop() -> None:
            tasks = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.run(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=20)
        self._loop.close()


@pytest.fixture
def listening(make_stack: Callable[..., Any]) -> Iterator[Listening]:
    server = Listening(make_stack)
    with contextlib.closing(server):
        yield server
