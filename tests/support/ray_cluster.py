"""A real Ray of one node, on the loopback interface."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

WAIT_S = 120.0
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class RayCluster:
    """Where it listens."""

    dashboard: str
    """URL of job submission, and of the `serve` command."""


@contextlib.contextmanager
def ray_cluster(folder: Path, *, num_cpus: int) -> Iterator[RayCluster]:
    """Ends with everything that runs on it. Its log is `folder / "log"`."""
    port, dashboard, agent = free_ports(3)
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
        *("--node-ip-address", "127.0.0.1", "--port", str(port), "--num-cpus", str(num_cpus)),
        *("--include-dashboard", "true", "--dashboard-host", "127.0.0.1"),
        *("--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(agent)),
        "--disable-usage-stats",
        *("--temp-dir", f"/tmp/ray-{os.getpid()}", "--object-store-memory", "80000000"),
    ]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"},
        )
    url = f"http://127.0.0.1:{dashboard}"
    try:
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                if httpx.get(f"{url}/api/version", trust_env=False).status_code == 200:
                    break
            except httpx.HTTPError:
                pass
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield RayCluster(url)
    finally:
        process.terminate()
        process.wait(30)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
