"""One server of the fleet as a process: the real application over the engine's double."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import time
from collections.abc import AsyncIterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from starlette.responses import StreamingResponse

from alter_core.substrate import Substrate
from server.api.app import attach
from server.audit import AuditLog
from server.domains import DomainService
from server.parts import Parts, deployment_of, request_service
from server.registry import ImportPolicy
from server.requests import jobs
from server.requests.jobs import RESULT, JobRunner, JobState, LocalJobs
from server.requests.settings import RequestSettings
from server.settings import token_digest
from tests.support.engine_double import EngineDouble
from tests.support.words import Words

from .points import PointedRegistry, PointedStore, Points

STREAM = "/v1/stream"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReplicaSettings:
    """What one process is started with."""

    port: int
    registry: str
    """URL."""
    store: Path
    audit_log: Path
    substrate: Path
    token: str
    max_domains: int
    lease_s: float
    margin_s: float
    poll_s: float
    timeout_s: float
    token_s: float
    """How long the double takes for a token."""
    job_plan: dict[str, Any] | None = None
    """Of `tests.support.scripted_job`, for unlearning requests; None: each fails."""


def run(settings: ReplicaSettings, orders: Connection) -> None:
    """Serves until the process is told to stop."""
    settings.audit_log.parent.mkdir(parents=True, exist_ok=True)
    with settings.audit_log.with_name("log").open("ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.CRITICAL)
    logging.raiseExceptions = False  # on a full disk nothing can be logged
    points = Points()
    points.obey(orders)
    asyncio.run(_serve(settings, points))


async def _serve(settings: ReplicaSettings, points: Points) -> None:
    substrate = Substrate.read(settings.substrate)
    engine = EngineDouble(substrate, settings.max_domains, token_s=settings.token_s)
    engine.before_step = points.before_step
    registry = _registry(settings, substrate, points)
    store = PointedStore(str(settings.store))
    store.points = points
    audit_log = AuditLog.open(settings.audit_log)
    parts = Parts.over(
        engine,
        substrate,
        registry,
        store,
        settings.audit_log.with_name("cache"),
        max_domains=settings.max_domains,
        audit_log=audit_log,
    )
    requests = request_service(
        parts,
        RequestSettings(),
        settings.audit_log.with_name("unlearning"),
        _jobs(settings),
        model=settings.substrate,
        substrate=settings.substrate,
    )
    app = FastAPI()
    _add_stream(app, engine, parts.service)
    runtime = attach(app)
    runtime.open(
        parts,
        token_digest(settings.token),
        audit=audit_log,
        sources=ImportPolicy(folders=(settings.substrate.parent,)),
        prompts=Words(),
        writer=Words(),
        requests=requests,
    )
    await parts.start({})
    requests.start()
    config = uvicorn.Config(
        app, host="127.0.0.1", port=settings.port, log_level="critical", lifespan="on"
    )
    await uvicorn.Server(config).serve()


def _jobs(settings: ReplicaSettings) -> JobRunner:
    if settings.job_plan is None:
        return _NoJobs()
    jobs.MODULE = "tests.support.scripted_job"
    os.environ["ALTER_TEST_JOB"] = json.dumps(settings.job_plan)
    return LocalJobs(1)


class _NoJobs:
    """A `JobRunner` that trains nothing: requests are made up, and end where a job would begin."""

    async def start(self, folder: Path, spec: dict[str, Any]) -> None:
        """See `JobRunner.start`."""
        folder.mkdir(exist_ok=True)
        (folder / RESULT).write_text(json.dumps({"outcome": "failed", "error": "training"}))

    async def state(self, folder: Path) -> JobState:
        """See `JobRunner.state`."""
        return "ended" if (folder / RESULT).exists() else "none"

    async def cancel(self, folder: Path) -> None:
        """See `JobRunner.cancel`."""


def _registry(settings: ReplicaSettings, substrate: Substrate, points: Points) -> PointedRegistry:
    registry = PointedRegistry.open(
        settings.registry,
        deployment_of(substrate),
        max_domains=settings.max_domains,
        lease_s=settings.lease_s,
        clock_margin_s=settings.margin_s,
        poll_s=settings.poll_s,
        timeout_s=settings.timeout_s,
    )
    registry.points = points
    return registry


def _add_stream(app: FastAPI, engine: EngineDouble, service: DomainService) -> None:
    async def events(num_tokens: int) -> AsyncIterator[bytes]:
        async for token in engine.generate([1, 2, 3], num_tokens):
            # No await since the token was computed: this is what it was computed with, and when.
            shown = {
                "t": time.monotonic(),
                "token": token,
                "epoch": service.epoch,
                "active": sorted(engine.active),
            }
            yield b"data: " + json.dumps(shown).encode() + b"\n\n"

    @app.post(STREAM)
    async def stream(num_tokens: int) -> StreamingResponse:
        return StreamingResponse(events(num_tokens), media_type="text/event-stream")
