"""Runs the training of a request outside the serving process.

A job is `python -m alter_cli.unlearning_job FOLDER`. Its folder holds

    job.json        what it is to do, written before it starts
    progress.json   how far it has come
    result.json     what came of it, written last
    out/            the expert, as `alter train` writes it
    log             what it printed: figures and names of files, no text

A job that ends without `result.json` was killed or lost. It can be started again in the same folder, and goes
on where the training was last saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, Protocol

from alter_core.errors import RequestsClosedError

from .records import Progress
from .workspace import write_synced

SPEC = "job.json"
PROGRESS = "progress.json"
RESULT = "result.json"
OUT = "out"
LOG = "log"
LOCK = "lock"
MODULE = "alter_cli.unlearning_job"
CANCEL_GRACE_S = 10.0
_SECRETS = frozenset(("ALTER_ADMIN_TOKEN", "VLLM_API_KEY"))
_children: list[subprocess.Popen[bytes]] = []
"""Of this process, to be reaped. They are not its to end."""

JobState = Literal["none", "running", "ended", "lost"]
"""`ended`: there is a result."""


class JobRunner(Protocol):
    """An engine of jobs. `folder` is the job's; what it was started with is found through it alone."""

    async def start(self, folder: Path, spec: dict[str, Any]) -> None:
        """Starts a job that does not run. Raises: RequestsClosedError."""

    async def state(self, folder: Path) -> JobState:
        """Where the job is. Raises: RequestsClosedError if nobody can say."""

    async def cancel(self, folder: Path) -> None:
        """Returns once nothing of the job runs any more. Raises: RequestsClosedError."""


class LocalJobs:
    """Processes of this machine, which outlive the server.

    A job holds the lock of its folder from before it begins until it ends, however it ends, and writes its
    process id into it: whoever looks at the lock knows whether it runs, also after a restart of the server.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        """`num_threads`: of torch; by default half of the cores that this process may use."""
        self._num_threads = num_threads or max(1, len(os.sched_getaffinity(0)) // 2)

    async def start(self, folder: Path, spec: dict[str, Any]) -> None:
        """See `JobRunner.start`."""
        await asyncio.to_thread(self._start, folder, spec)

    async def state(self, folder: Path) -> JobState:
        """See `JobRunner.state`."""
        _children[:] = [child for child in _children if child.poll() is None]
        if not (folder / LOCK).exists():
            return "none"
        if _holder(folder) is not None:
            return "running"
        return "ended" if (folder / RESULT).exists() else "lost"

    async def cancel(self, folder: Path) -> None:
        """See `JobRunner.cancel`. It may finish what it writes; then it is killed."""
        for number, patience_s in (
            (signal.SIGTERM, CANCEL_GRACE_S),
            (signal.SIGKILL, CANCEL_GRACE_S),
        ):
            holder = _holder(folder)
            if holder is None:
                return
            if holder:  # or it has only just begun, and has not said who it is
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(holder, number)
            deadline = asyncio.get_running_loop().time() + patience_s
            while asyncio.get_running_loop().time() < deadline:
                await self.state(folder)  # reaps it
                if _holder(folder) is None:
                    return
                await asyncio.sleep(0.05)
        raise RequestsClosedError(
            "A training job cannot be ended",
            expected="a process that ends when killed",
            got="one that stays",
        )

    def _start(self, folder: Path, spec: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True, mode=0o700)
        (folder / RESULT).unlink(missing_ok=True)
        write_synced(folder / SPEC, json.dumps(spec).encode())
        lock = os.open(folder / LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with (folder / LOG).open("ab") as log:
                child = subprocess.Popen(
                    [sys.executable, "-m", MODULE, str(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=job_environment() | {"OMP_NUM_THREADS": str(self._num_threads)},
                    pass_fds=(lock,),
                    # Not a session: Linux shares out time by session, whatever the niceness of a process.
                    process_group=0,
                )
            _children.append(child)
        except OSError as error:
            raise RequestsClosedError(
                "The training job cannot be started",
                expected="a process with room on the disk",
                got=error.strerror or type(error).__name__,
                fix="It is tried again.",
            ) from error
        finally:
            os.close(lock)  # the job has inherited it


def read_progress(folder: Path) -> tuple[str, Progress] | None:
    """The job's phase, `training` or `evaluating`, and its stage."""
    try:
        found = json.loads((folder / PROGRESS).read_bytes())
        return found["phase"], Progress(
            stage=found["stage"], done=found["done"], total=found["total"]
        )
    except (OSError, ValueError, KeyError):
        return None


def read_result(folder: Path) -> dict[str, Any]:
    """What came of it. Raises: RequestsClosedError."""
    try:
        found: dict[str, Any] = json.loads((folder / RESULT).read_bytes())
        return found
    except (OSError, ValueError) as error:
        raise RequestsClosedError(
            "The result of a training job cannot be read",
            expected=RESULT,
            got=type(error).__name__,
            fix="It is tried again.",
        ) from error


def job_environment() -> dict[str, str]:
    """This process's, without what opens its doors."""
    return {name: value for name, value in os.environ.items() if name not in _SECRETS}


def _holder(folder: Path) -> int | None:
    """The process group that holds a job's lock, 0 before it has written that down; None if nobody does."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(lock, 20, 0) or b"0")
    finally:
        os.close(lock)
    return None
