"""Jobs of a Ray cluster, in place of processes of this machine: where RAY_ADDRESS names one.

Every node that may run a job must see the workspace, the base model, the substrate and the samples under the
same paths, and have this package installed. What Ray is asked for: GPUs if training is to use one.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from alter_core.errors import ConfigError, RequestsClosedError

from .jobs import CANCEL_GRACE_S, LOCK, MODULE, RESULT, SPEC, JobState
from .workspace import write_synced

P = ParamSpec("P")
T = TypeVar("T")

SUBMISSION = "ray-submission"
"""File of a job's folder: the id of its last submission, written before it is made."""


class RayJobs:
    """A `JobRunner` over Ray's job submission."""

    def __init__(self, address: str) -> None:
        """`address`: as Ray takes it, e.g. `http://HEAD:8265`.

        Raises: ConfigError if Ray is not installed, or not there.
        """
        try:
            from ray.job_submission import JobSubmissionClient

            self._client = JobSubmissionClient(address)
        except (ImportError, ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                "Training jobs cannot be given to Ray",
                expected="the extra `ray` of this package, and a cluster at RAY_ADDRESS",
                got=type(error).__name__,
                fix="Install alter-server[ray], start the cluster, or unset RAY_ADDRESS.",
            ) from error

    async def start(self, folder: Path, spec: dict[str, Any]) -> None:
        """See `JobRunner.start`."""
        await asyncio.to_thread(self._start, folder, spec)

    async def state(self, folder: Path) -> JobState:
        """See `JobRunner.state`."""
        return await asyncio.to_thread(self._state, folder)

    async def cancel(self, folder: Path) -> None:
        """See `JobRunner.cancel`."""
        if (submission := _submission(folder)) is None:
            return
        if await self.state(folder) == "running":
            await asyncio.to_thread(self._ask, self._client.stop_job, submission)
        deadline = asyncio.get_running_loop().time() + 2 * CANCEL_GRACE_S
        while await self.state(folder) == "running":
            if asyncio.get_running_loop().time() > deadline:
                raise RequestsClosedError(
                    "A training job cannot be ended",
                    expected="a job that ends when it is stopped",
                    got="one that goes on",
                    fix="It is tried again; see Ray's dashboard.",
                )
            await asyncio.sleep(0.2)

    def _start(self, folder: Path, spec: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True, mode=0o700)
        (folder / RESULT).unlink(missing_ok=True)
        write_synced(folder / SPEC, json.dumps(spec).encode())
        (folder / LOCK).touch(0o600)
        submission = f"alter-{uuid.uuid4()}"
        write_synced(folder / SUBMISSION, submission.encode())
        self._ask(
            self._client.submit_job,
            entrypoint=shlex.join([sys.executable, "-m", MODULE, str(folder)]),
            submission_id=submission,
            entrypoint_num_gpus=1 if spec["device"] == "cuda" else None,
        )

    def _state(self, folder: Path) -> JobState:
        submission = _submission(folder)
        if submission is None:
            return "none"
        known = {job.submission_id: job.status for job in self._ask(self._client.list_jobs)}
        status = known.get(submission)
        if status is not None and not status.is_terminal():
            return "running"
        return "ended" if (folder / RESULT).exists() else "lost"

    def _ask(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Raises: RequestsClosedError."""
        try:
            return function(*args, **kwargs)
        except Exception as error:  # of requests, aiohttp and Ray itself
            raise RequestsClosedError(
                "Ray does not answer",
                expected="a cluster at RAY_ADDRESS",
                got=type(error).__name__,
                fix="It is tried again.",
            ) from error


def _submission(folder: Path) -> str | None:
    try:
        return (folder / SUBMISSION).read_text("ascii")
    except FileNotFoundError:
        return None
