"""A real `alter serve` in a process of its own, on a free port of the loopback interface."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx

from alter_core.errors import EngineError

START_TIMEOUT_S = 300
_STOP_TIMEOUT_S = 30
_LOG_LINES_SHOWN = 25


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunningServer:
    """Where a started server answers."""

    url: str
    """Root, without `/v1`."""
    admin_token: str
    model: str
    """Name of the model in the OpenAI API."""
    process: subprocess.Popen[bytes]
    log: Path
    """Where the process writes."""

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Returns once it answers. Raises: EngineError with the end of the log if it does not."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(httpx.TransportError):
                # vLLM as it comes has no such route, and answers once it is ready.
                answer = httpx.get(f"{self.url}/health/ready", timeout=5)
                if answer.status_code in (httpx.codes.OK, httpx.codes.NOT_FOUND):
                    return
            time.sleep(0.2)
        end = "\n".join(self.log.read_text("utf-8", "replace").splitlines()[-_LOG_LINES_SHOWN:])
        exit_code = self.process.poll()
        raise EngineError(
            "The server did not come up",
            expected=f"an answer from {self.url}/health/ready within {timeout_s} s",
            got="no answer" if exit_code is None else f"exit code {exit_code}",
            fix=f"The end of {self.log}:\n{end}",
        )


@contextlib.contextmanager
def serve(
    model: Path, substrate: Path, log: Path, vllm_flags: Sequence[str] = ()
) -> Iterator[RunningServer]:
    """Runs `alter serve` until the block ends; as it begins, it has yet to come up. Logs go to `log`."""
    command = [
        *(sys.executable, "-m", "alter_cli.main", "serve", str(model)),
        *("--alter-substrate", str(substrate)),
        *vllm_flags,
    ]
    with run_server(command, log) as running:
        yield running


@contextlib.contextmanager
def run_server(command: Sequence[str], log: Path) -> Iterator[RunningServer]:
    """The same with any command that starts a server and takes vLLM's flags."""
    port, token = _free_port(), secrets.token_urlsafe(24)
    command = [
        *command,
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "demo"),
    ]
    environment = os.environ | {"ALTER_ADMIN_TOKEN": token, "HF_HUB_OFFLINE": "1"}
    environment.pop("OMP_WAIT_POLICY", None)  # set for training; a server's threads should spin
    environment.setdefault("ALTER_AUDIT_LOG", str(log.absolute().with_name("audit.sqlite")))
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    folder = log.absolute().parent
    with (
        tempfile.TemporaryDirectory(prefix="registry-", dir=folder) as state,
        log.open("wb") as output,
    ):
        # A registry of its own: it begins with nothing active, whatever an earlier run has left.
        environment.setdefault("ALTER_REGISTRY", f"sqlite:///{state}/registry.sqlite")
        environment.setdefault("ALTER_STORE", f"{state}/bundles")
        # A process group of its own, but not a session: Linux shares out time by session, and where cores
        # are few the client would see its stream in bursts.
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, process_group=0
        )
        try:
            yield RunningServer(
                url=f"http://127.0.0.1:{port}",
                admin_token=token,
                model="demo",
                process=process,
                log=log,
            )
        finally:
            _stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server and its workers, which share its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
