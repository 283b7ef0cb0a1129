"""Jobs on a real Ray, of one node and this machine."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from alter_core.errors import ConfigError
from server.requests import ray_jobs
from server.requests.ray_jobs import RayJobs

WAIT_S = 120.0
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a cluster with one core."""
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        port, dashboard = first.getsockname()[1], second.getsockname()[1]
    folder = tmp_path_factory.mktemp("ray")
    command = [
        *(str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"),
        *("--node-ip-address", "127.0.0.1", "--port", str(port), "--num-cpus", "1"),
        *("--include-dashboard", "true", "--dashboard-host", "127.0.0.1"),
        *("--dashboard-port", str(dashboard), "--disable-usage-stats"),
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
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture
def jobs(address: str, monkeypatch: pytest.MonkeyPatch) -> RayJobs:
    monkeypatch.setattr(ray_jobs, "MODULE", "tests.support.scripted_job")
    return RayJobs(address)


def spec(folder: Path, **plan: Any) -> dict[str, Any]:
    """What a scripted job reads, and its plan: Ray's processes have an environment of their own."""
    (folder / "forget.jsonl").write_text("{}")
    (folder / "plan.json").write_text(json.dumps({"figures": {}} | plan))
    return {
        "domain": "authors",
        "forget": str(folder / "forget.jsonl"),
        "retain": [],
        "allow_unknown": False,
        "device": "cpu",
        "plan": str(folder / "plan.json"),
    }


async def until(jobs: RayJobs, folder: Path, state: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while (found := await jobs.state(folder)) != state:
            assert found in ("none", "running"), found
            await asyncio.sleep(0.2)


def test_a_job_runs_dies_runs_again_and_is_cancelled(jobs: RayJobs, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "manifest.json").touch()

    async def test() -> None:
        folder = tmp_path / "job"
        assert await jobs.state(folder) == "none"
        await jobs.cancel(folder)
        await jobs.start(folder, spec(tmp_path, bundle=str(bundle), deaths=1))
        await until(jobs, folder, "lost")
        await jobs.start(folder, spec(tmp_path, bundle=str(bundle), deaths=1))
        await until(jobs, folder, "ended")
        assert json.loads((folder / "result.json").read_text())["outcome"] == "trained"
        assert (folder / "out" / "authors" / "manifest.json").exists()

        await jobs.start(folder, spec(tmp_path, bundle=str(bundle), waits=str(tmp_path / "never")))
        async with asyncio.timeout(WAIT_S):
            while len((folder / "starts").read_text().splitlines()) < 3:
                await asyncio.sleep(0.1)
        assert await jobs.state(folder) == "running"
        process = int((folder / "starts").read_text().split()[-2])
        await jobs.cancel(folder)
        assert await jobs.state(folder) == "lost"
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)

    asyncio.run(test())


def test_a_cluster_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="Ray"):
        RayJobs("http://127.0.0.1:1")
