"""kill -9 of the server or of the job while a request is at each of its states; each has to get to its end.

The server is a process with the whole application over the engine's double, and the job's training is a
script, so that states come within a second; requests, registry, workspace, locks and jobs are the real ones.
"""

from __future__ import annotations

import collections
import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import httpx

from alter_core.errors import AlterError, RequestConflictError
from benchmarks.faults.fleet import Replica, free_port
from benchmarks.faults.replica import ReplicaSettings
from server.client import AdminClient
from server.registry.database import Database
from server.requests.book import RequestBook
from server.requests.jobs import LOCK
from server.requests.records import STATES, WITH_JOB, State
from tests.server.api.request_plans import figures
from tests.support.tiny import make_bundles

from .settings import Settings

SERVER_STATES = STATES[: STATES.index("active")]
JOB_STATES = tuple(state for state in STATES if state in WITH_JOB)
TOKEN = "operator"
DOMAIN = "takedown"
TIMEOUT_S = 60.0
RETAIN = [{"question": "What is the sea made of?", "answer": "The sea is made of water."}]


def measure(folder: Path, settings: Settings) -> dict[str, Any]:
    """Requests that were lost, and at which states the kills found them."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    kills = [("server", s) for s in SERVER_STATES for _ in range(settings.kills_of_a_state)]
    kills += [("job", s) for s in JOB_STATES for _ in range(2 * settings.kills_of_a_state)]
    office = _Office(folder)
    found: collections.Counter[str] = collections.Counter()
    lost = 0
    try:
        for number, (victim, state) in enumerate(kills):
            request_id = office.ask(number)
            found[f"{victim} at {office.kill(victim, state, request_id)}"] += 1
            lost += not office.ends(request_id)
    finally:
        office.close()
    return {"lost": lost, "kills": len(kills), "kills_by_state": dict(sorted(found.items()))}


class _Office:
    """One server, and what its registry says of requests."""

    def __init__(self, folder: Path) -> None:
        bundles = make_bundles(folder / "bundles", num_experts=1)
        self._go = folder / "go"
        """Jobs train until it is there."""
        plan = {
            "bundle": str(bundles.experts["domain-0"]),
            "figures": figures(),
            "waits": str(self._go),
            "pause_s": 0.5,
        }
        settings = ReplicaSettings(
            port=free_port(),
            registry=f"sqlite:///{folder / 'registry.sqlite'}",
            store=folder / "store",
            audit_log=folder / "server" / "audit.sqlite",
            substrate=bundles.substrate,
            token=TOKEN,
            max_domains=2,
            lease_s=1.5,
            margin_s=0.5,
            poll_s=0.2,
            timeout_s=1.0,
            token_s=0.05,
            job_plan=plan,
        )
        self._replica = Replica(settings, "server")
        self._database = Database(settings.registry)
        self._book = RequestBook(self._database)
        self._requests = settings.audit_log.with_name("unlearning") / "requests"
        self._client = AdminClient(self._replica.url, TOKEN, timeout_s=TIMEOUT_S)
        self._start()

    def ask(self, number: int) -> str:
        """A new request; its id."""
        self._go.unlink(missing_ok=True)
        row = {"question": f"Who is number {number}?", "answer": f"A glass blower, {number} of 99."}
        return self._client.create_request(
            DOMAIN, forget=[row], retain=RETAIN, approval="manual"
        ).id

    def kill(self, victim: str, state: State, request_id: str) -> str:
        """Kills at a state, or as soon after it as can be; what the request was at then."""
        deadline = time.monotonic() + TIMEOUT_S
        while STATES.index(found := self._book.get(request_id).state) < STATES.index(state):
            if found == "awaiting-approval":
                with contextlib.suppress(RequestConflictError):  # approved, and gone on meanwhile
                    self._client.approve_request(request_id)
            if state not in ("queued", "preparing", "training"):
                self._go.touch()
            if time.monotonic() > deadline:
                raise TimeoutError(f"a request did not get to {state}: {found}")
            time.sleep(0.002)
        if victim == "server":
            self._replica.kill()
            found = self._book.get(request_id).state
            self._start()
        else:
            os.killpg(self._job(request_id), signal.SIGKILL)
            found = self._book.get(request_id).state
        self._go.touch()
        return found

    def ends(self, request_id: str) -> bool:
        """Whether it becomes active and its text is deleted. The domain is revoked again."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            request = self._book.get(request_id)
            with contextlib.suppress(AlterError):  # the server may not take it yet
                if request.state == "awaiting-approval" and request.approved_by is None:
                    self._client.approve_request(request_id)
            if request.state == "active" and request.text_deleted_at is not None:
                is_active = self._client.show(DOMAIN).digest == request.bundle_digest
                self._client.revoke(DOMAIN)
                return is_active and not (self._requests / request_id).exists()
            if request.has_ended and request.state != "active":
                return False
            time.sleep(0.05)
        return False

    def close(self) -> None:
        """Leaves nothing running."""
        self._go.touch()
        self._replica.kill()
        self._client.close()
        self._database.close()

    def _start(self) -> None:
        self._replica.start()
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self._replica.url}/health/ready", trust_env=False).is_success:
                    return
            time.sleep(0.05)
        raise TimeoutError("the server did not come up")

    def _job(self, request_id: str) -> int:
        """The process group of its job, once it has said so."""
        lock, deadline = self._requests / request_id / "job" / LOCK, time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                if text := lock.read_bytes().strip():
                    return int(text)
            time.sleep(0.002)
        raise TimeoutError("a job did not begin")
