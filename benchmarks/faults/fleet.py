"""A fleet of processes, one administrator and the clients that stream from all of them."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import dataclasses
import json
import multiprocessing
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from alter_core.errors import RegistryError
from alter_core.substrate import Substrate
from server.parts import deployment_of
from server.registry import Change, Registry

from .database import Place
from .ledger import Acknowledged, Ledger, Token
from .points import Action
from .replica import STREAM, ReplicaSettings, run
from .settings import FaultSettings

ADMIN_TOKEN = "fault-run"
READY_TIMEOUT_S = 60.0
TOKENS_OF_A_STREAM = 400
_POLL_S = 0.03
_WATCH_S = 0.15
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["benchmarks.faults.warm"])
"""What servers are forked from has loaded already what they need."""


class NotReadyError(Exception):
    """A server did not become ready, or a change not active, in time."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the admin side said; status 0: nothing, or not to the end."""

    status: int
    body: dict[str, Any]

    @property
    def is_recorded(self) -> bool:
        """The change is acknowledged as durable."""
        return self.status in (200, 201, 202)


class ServerProcess(abc.ABC):
    """What can be done to a server from outside."""

    @property
    @abc.abstractmethod
    def pid(self) -> int:
        """Of the process that answers."""

    @property
    @abc.abstractmethod
    def is_alive(self) -> bool:
        """False once that process is gone."""

    def send_signal(self, number: signal.Signals) -> None:
        """Stops or continues the process."""
        if self.is_alive:
            os.kill(self.pid, number)

    @contextlib.contextmanager
    def full_disk(self) -> Iterator[None]:
        """No file of the process can be written, as on a full disk."""
        limit = resource.RLIMIT_FSIZE
        before = resource.prlimit(self.pid, limit, (0, resource.RLIM_INFINITY))
        try:
            yield
        finally:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(self.pid, limit, before)


class Replica(ServerProcess):
    """One server. `start` it; a process that was killed can be started again."""

    def __init__(self, settings: ReplicaSettings, name: str) -> None:
        self.settings = settings
        self.name = name
        self.url = f"http://127.0.0.1:{settings.port}"
        self.started_at = 0.0
        self._process: Any = None
        self._orders: Any = None

    def start(self) -> None:
        """Begins; see `Fleet.ready`."""
        self._orders, theirs = processes.Pipe()
        self._process = processes.Process(
            target=run, args=(self.settings, theirs), name=self.name, daemon=True
        )
        self.started_at = time.monotonic()
        self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return int(self._process.pid)

    @property
    def is_alive(self) -> bool:
        """False once the process is gone."""
        return self._process is not None and bool(self._process.is_alive())

    def kill(self) -> None:
        """SIGKILL, and nothing of the process is left."""
        if self._process is not None:
            self._process.kill()
            self._process.join(10)
            self._process.close()
            self._process = None
            self._orders.close()

    async def gone(self, timeout_s: float) -> bool:
        """Waits for the process to die by itself."""
        deadline = time.monotonic() + timeout_s
        while self.is_alive:
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    async def arm(self, point: str, action: Action | None) -> bool:
        """The next pass of the point dies or fails; None: takes that back. True if it was armed still."""

        def order() -> bool:
            with contextlib.suppress(EOFError, OSError):
                self._orders.send((point, action))
                if self._orders.poll(5):
                    return bool(self._orders.recv())
            return True

        return await asyncio.to_thread(order)


class Fleet:
    """See the module. `close()` it."""

    ready_timeout_s = READY_TIMEOUT_S

    def __init__(
        self,
        place: Place,
        folder: Path,
        substrate: Path,
        settings: FaultSettings,
        *,
        max_domains: int,
    ) -> None:
        self.place = place
        self.folder = folder
        self.ledger = Ledger()
        self.replicas: list[Replica] = []
        self._substrate = substrate
        self._settings = settings
        self._max_domains = max_domains
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(20, connect=2),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            headers={"Authorization": f"Bearer {ADMIN_TOKEN}"},
            trust_env=False,
        )
        self._streams: dict[str, asyncio.Task[None]] = {}
        self._checks: Registry | None = None
        self._checks_lock = threading.Lock()
        self._is_closed = False
        self._watch: asyncio.Task[None] | None = None

    @property
    def store(self) -> Path:
        """Folder of the bundles, shared by all servers."""
        return self.folder / "store"

    async def add(self) -> Replica:
        """A new server, started."""
        index = len(self.replicas)
        settings = ReplicaSettings(
            port=free_port(),
            registry=await self.place.url_of(index),
            store=self.store,
            audit_log=self.folder / f"replica-{index}" / "audit.sqlite",
            substrate=self._substrate,
            token=ADMIN_TOKEN,
            max_domains=self._max_domains,
            lease_s=self._settings.lease_s,
            margin_s=self._settings.margin_s,
            poll_s=self._settings.poll_s,
            timeout_s=self._settings.timeout_s,
            token_s=self._settings.token_s,
        )
        replica = Replica(settings, f"replica-{index}")
        self.replicas.append(replica)
        await asyncio.to_thread(replica.start)
        self._streams[replica.name] = asyncio.create_task(self._follow(replica))
        return replica

    async def remove(self, replica: Replica) -> None:
        """Kills a server for good."""
        self.replicas.remove(replica)
        await self._end_stream(replica)
        await asyncio.to_thread(replica.kill)

    async def restart(self, replica: Replica) -> None:
        """Kills what may be left of a server, and starts it again."""
        await asyncio.to_thread(replica.kill)
        await asyncio.to_thread(replica.start)

    async def ready(self, *replicas: Replica) -> float:
        """Waits until these, or all, are ready; the time. What has died is started again.

        Raises: NotReadyError.
        """
        deadline = time.monotonic() + self.ready_timeout_s
        for replica in replicas or tuple(self.replicas):
            while not await self.is_ready(replica):
                if time.monotonic() > deadline:
                    status = await self.ask("GET", replica, "/status")
                    raise NotReadyError(f"{replica.name} is not ready: {status}")
                if not replica.is_alive:
                    await self.restart(replica)
                await asyncio.sleep(_POLL_S)
        return time.monotonic()

    async def is_ready(self, replica: Replica) -> bool:
        """What `/health/ready` says."""
        try:
            answer = await self._http.get(f"{replica.url}/health/ready", timeout=2)
        except httpx.HTTPError:
            return False
        return answer.status_code == httpx.codes.OK

    async def ask(
        self, method: str, replica: Replica, path: str, *, timeout_s: float = 20, **fields: Any
    ) -> Answer:
        """One request to the admin side. Never raises."""
        try:
            answer = await self._http.request(
                method, f"{replica.url}/admin{path}", timeout=timeout_s, **fields
            )
            return Answer(answer.status_code, answer.json())
        except (httpx.HTTPError, ValueError):
            return Answer(0, {})

    async def change(
        self,
        replica: Replica,
        domain: str,
        bundle: Path | None,
        *,
        timeout_s: float = 20,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Asks for an activation, or without a bundle for a revocation, and notes what was promised."""
        if bundle is None:
            answer = await self.ask(
                "DELETE",
                replica,
                f"/forget-domains/{domain}",
                timeout_s=timeout_s,
                headers=headers,
            )
        else:
            body = {"name": domain, "bundle": str(bundle)}
            answer = await self.ask(
                "POST",
                replica,
                "/forget-domains",
                timeout_s=timeout_s,
                json=body,
                headers=headers,
            )
        self._note(answer)
        return answer

    async def active(self, answer: Answer) -> None:
        """Follows a recorded change until it is active. Raises: NotReadyError."""
        deadline = time.monotonic() + self.ready_timeout_s
        path = f"/operations/{answer.body['id']}"
        while answer.body.get("state") != "active":
            if time.monotonic() > deadline:
                raise NotReadyError(f"a change is not active: {answer.body}")
            for replica in tuple(self.replicas):
                found = await self.ask(
                    "GET", replica, path, headers={"Prefer": "wait=1"}, timeout_s=3
                )
                if found.status == httpx.codes.OK:
                    answer = found
                    self._note(found)
                    break
            await asyncio.sleep(_POLL_S)

    def log(self) -> tuple[Change, ...]:
        """The registry's log, read past everything that was put in its way."""
        with self._registry() as registry:
            return registry.changes_since(0)

    def watch(self) -> None:
        """From now on asks the registry itself which epoch is active, beside what operators are told."""
        self._watch = asyncio.create_task(self._keep_watching())

    async def _keep_watching(self) -> None:
        known = 0
        while True:
            with contextlib.suppress(RegistryError):  # it may be down
                known = await asyncio.to_thread(self._active_after, known)
                self.ledger.is_active(known, time.monotonic())
            await asyncio.sleep(_WATCH_S)

    def _active_after(self, known: int) -> int:
        with self._registry() as registry:
            head = registry.head()
            return head if head > known and registry.barrier(head).is_passed else known

    @contextlib.contextmanager
    def _registry(self) -> Iterator[Registry]:
        with self._checks_lock:
            if self._is_closed:
                raise RegistryError("the fleet is closed")
            if self._checks is None:
                self._checks = Registry.open(
                    self.place.url,
                    deployment_of(Substrate.read(self._substrate)),
                    max_domains=self._max_domains,
                )
            yield self._checks

    async def check(self) -> None:
        """Checks what was generated so far."""
        log = await asyncio.to_thread(self.log)
        self.ledger.check(log)

    async def close(self) -> None:
        """Ends everything."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        for replica in tuple(self.replicas):
            await self.remove(replica)
        await self._http.aclose()
        await asyncio.to_thread(self._close_registry)

    def _close_registry(self) -> None:
        with self._checks_lock:
            self._is_closed = True
            if self._checks is not None:
                self._checks.close()

    def _note(self, answer: Answer) -> None:
        if not answer.is_recorded or "id" not in answer.body:
            return
        body = answer.body
        if body["outcome"] == "unchanged":
            return  # its epoch is the one that found it so
        self.ledger.acknowledge(
            Acknowledged(body["id"], body["epoch"], body["name"], body["digest"])
        )
        if body["state"] == "active":
            self.ledger.is_active(body["epoch"], time.monotonic())

    async def _follow(self, replica: Replica) -> None:
        """Streams from a server for ever."""
        url = f"{replica.url}{STREAM}?num_tokens={TOKENS_OF_A_STREAM}"
        while True:
            with contextlib.suppress(httpx.HTTPError):
                async with self._http.stream("POST", url, timeout=10) as answer:
                    if answer.status_code == httpx.codes.OK:
                        async for line in answer.aiter_lines():
                            if line.startswith("data: "):
                                self._token(replica, json.loads(line[6:]))
            await asyncio.sleep(0.05)

    def _token(self, replica: Replica, shown: dict[str, Any]) -> None:
        self.ledger.generated(
            Token(replica.name, shown["t"], shown["epoch"], frozenset(shown["active"]))
        )

    async def _end_stream(self, replica: Replica) -> None:
        task = self._streams.pop(replica.name, None)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def free_port() -> int:
    """One of the loopback interface that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
