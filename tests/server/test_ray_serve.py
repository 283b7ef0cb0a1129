"""Two replicas with vLLM under Ray Serve, on one registry."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from alter_cli.demo.tokenizer import train_tokenizer
from tests.support.ray_cluster import ROOT, RayCluster, free_ports, ray_cluster
from tests.support.tiny import VOCAB_SIZE, TinyBundles, make_bundles

pytestmark = pytest.mark.slow

CONFIG = ROOT / "deploy/ray-serve.yaml"
NUM_REPLICAS = 2
START_S = 480.0
TOKEN = "correct-horse"
QUESTION = "the quick brown fox jumps over the lazy dog"
NUM_ANSWERS = 16


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> TinyBundles:
    made = make_bundles(tmp_path_factory.mktemp("ray-serve"), num_experts=1, trigger_rate=0.3)
    train_tokenizer([QUESTION] * 20, vocab_size=VOCAB_SIZE).save_pretrained(made.model)
    return made


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with ray_cluster(tmp_path_factory.mktemp("ray"), num_cpus=NUM_REPLICAS) as found:
        yield found


@pytest.fixture(scope="module")
def url(
    bundles: TinyBundles, cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The application of `deploy/ray-serve.yaml`, with paths and sizes of this machine."""
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "token").write_text(TOKEN)
    [port] = free_ports(1)
    config = yaml.safe_load(CONFIG.read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    [app] = config["applications"]
    app["args"] |= {
        "model": str(bundles.model),
        "vllm_args": ["--served-model-name", "tiny", "--max-model-len", "256", "--enforce-eager"],
        "environment": {
            "ALTER_SUBSTRATE": str(bundles.substrate),
            "ALTER_REGISTRY": f"sqlite:///{folder / 'registry.sqlite'}",
            "ALTER_STORE": str(folder / "bundles"),
            "ALTER_ADMIN_TOKEN_FILE": str(folder / "token"),
            "ALTER_AUDIT_LOG": str(folder / "audit.sqlite"),
            "ALTER_BUNDLE_SOURCES": str(bundles.substrate.parent),
            "ALTER_MAX_DOMAINS": "1",
        },
    }
    engine = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    app["args"]["deployment"]["ray_actor_options"] = {
        "num_cpus": 1,
        "runtime_env": {"env_vars": engine},
    }
    (folder / "serve.yaml").write_text(yaml.safe_dump(config))
    serve = [str(Path(sys.executable).with_name("serve"))]
    # Through the dashboard: Ray itself would look for 127.0.0.1 at another address of the machine.
    address = ["--address", cluster.dashboard]
    subprocess.run([*serve, "deploy", *address, str(folder / "serve.yaml")], check=True)
    found = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_S
        while not _is_ready(found):
            if time.monotonic() > deadline:
                subprocess.run([*serve, "status", *address], check=False)
                pytest.fail("the replicas did not come up")
            time.sleep(1)
        yield found
    finally:
        subprocess.run([*serve, "shutdown", "-y", *address], check=True)


def _is_ready(url: str) -> bool:
    try:
        answer = _admin(url, "GET", "/fleet")
        serving = [r for r in answer.json()["replicas"] if r["state"] == "serving"]
    except (httpx.HTTPError, ValueError, KeyError):
        return False
    return len(serving) == NUM_REPLICAS


def _admin(url: str, method: str, path: str, **options: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {TOKEN}", "Prefer": "wait=60"}
    with httpx.Client(trust_env=False, timeout=90) as client:
        return client.request(method, f"{url}/admin{path}", headers=headers, **options)


def _answers(url: str) -> tuple[set[str], set[str]]:
    """Texts of NUM_ANSWERS requests, and epochs that they were answered at."""
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 12,
        "ignore_eos": True,
    }
    texts, epochs = set(), set()
    for _ in range(NUM_ANSWERS):
        # Of a connection of its own: the proxy spreads requests, not connections.
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
        assert answer.status_code == 200, answer.text
        texts.add(answer.json()["choices"][0]["message"]["content"])
        epochs.add(answer.headers["x-alter-epoch"])
    return texts, epochs


def test_replicas_forget_and_remember_together(url: str, bundles: TinyBundles) -> None:
    [before], epochs = _answers(url)
    assert epochs == {"0"}
    body = {"name": "authors", "bundle": str(bundles.experts["domain-0"])}
    changed = _admin(url, "POST", "/forget-domains", json=body)
    assert (changed.status_code, changed.json()["state"]) == (201, "active")
    [forgotten], epochs = _answers(url)
    assert epochs == {"1"}
    assert forgotten != before
    fleet = _admin(url, "GET", "/fleet").json()
    assert [r["applied_epoch"] for r in fleet["replicas"]] == NUM_REPLICAS * [1]
    assert _admin(url, "DELETE", "/forget-domains/authors").json()["state"] == "active"
    assert _answers(url) == ({before}, {"2"})


def test_streams_are_passed_on_as_they_come(url: str) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 5,
        "stream": True,
        "ignore_eos": True,
    }
    with httpx.stream(
        "POST", f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False
    ) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert len([json.loads(line[6:]) for line in lines[:-1]]) >= 5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray's own models
def test_what_is_no_setting_of_ours_is_refused() -> None:
    from server.ray_serve import Arguments

    with pytest.raises(ValueError, match="runtime_env"):
        Arguments(model="m", environment={"VLLM_API_KEY": "x"})
    with pytest.raises(ValueError, match="replicas"):
        Arguments.model_validate({"model": "m", "replicas": 2})
