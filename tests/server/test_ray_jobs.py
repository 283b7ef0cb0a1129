"""Jobs on a real Ray, of one node and this machine."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alter_core.errors import ConfigError
from server.requests import ray_jobs
from server.requests.ray_jobs import RayJobs
from tests.support.ray_cluster import WAIT_S, ray_cluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a cluster with one core."""
    with ray_cluster(tmp_path_factory.mktemp("ray"), num_cpus=1) as cluster:
        yield cluster.dashboard


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
