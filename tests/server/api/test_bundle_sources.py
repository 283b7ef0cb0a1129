"""Bundles that a request names lie below an allowed folder, or are not looked for at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from server.api.body_limit import MAX_BODY_BYTES
from server.registry import BundleStore, ImportPolicy
from server.signatures import SignaturePolicy
from tests.support.keys import make_key_pair
from tests.support.tiny import TinyBundles

pytestmark = pytest.mark.anyio


@pytest.fixture
async def stack(make_stack: Callable[..., Any], bundles: TinyBundles) -> Any:
    made = await make_stack()
    made.runtime.sources = ImportPolicy(folders=(bundles.substrate.parent,))
    return made


async def refused(stack: Any, bundle: str) -> dict[str, Any]:
    async with stack.client() as client:
        answer = await client.post(
            "/admin/forget-domains", json={"name": "a", "bundle": bundle, "in_flight": "recompute"}
        )
    assert answer.status_code == 422
    assert stack.engine.switches == []
    problem: dict[str, Any] = answer.json()
    return problem


@pytest.mark.parametrize(
    "bundle",
    [
        "/etc",
        "/etc/shadow",
        "/proc/self/root/etc",
        "{root}/../secret",
        "{root}/domain-0/../../secret",
        "{root}/link-to-secret",
        "{root}/link-up/secret",
        "file:///etc",
        "file://localhost/etc",
        "file:///{root}/%2e%2e/secret",
        "{root}-and-more/domain-0",
    ],
)
async def test_whatever_leads_out_is_refused_alike_there_or_not(
    bundle: str, stack: Any, bundles: TinyBundles, tmp_path: Path
) -> None:
    root = bundles.substrate.parent
    secret = root.parent / "secret"
    secret.mkdir(exist_ok=True)
    (secret / "manifest.json").write_text(json.dumps({"password": "hunter2"}))
    for name, target in {"link-to-secret": secret, "link-up": root.parent}.items():
        if not (root / name).is_symlink():
            (root / name).symlink_to(target)
    problem = await refused(stack, bundle.format(root=root))
    assert problem["type"].endswith(":bundle-source")
    absent = await refused(stack, "/no/such/place")
    assert {**problem, "instance": ""} == {**absent, "instance": ""}
    assert "hunter2" not in json.dumps(problem)


@pytest.mark.parametrize(
    "bundle",
    [
        "http://169.254.169.254/latest/meta-data",
        "https://example.org/expert",
        "s3://bucket/expert",
        "ftp://host/expert",
        "memory://expert",
        "local:///etc",
        "github://owner:repo@main/expert",
        "simplecache::file:///etc",
        "s3://allowed/experts/../secret",
        "s3://allowed/experts%2f..%2fsecret",
        "s3://allowed@other/experts/a",
        "s3://other/experts/a",
        "S3://allowed/experts-and-more/a",
    ],
)
async def test_other_schemes_and_hosts_are_not_asked(
    bundle: str, stack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object, **__: object) -> None:
        raise AssertionError("it was asked")

    monkeypatch.setattr("server.registry.store.url_to_fs", ask)
    stack.runtime.sources = ImportPolicy(sources=("s3://allowed/experts",))
    assert (await refused(stack, bundle))["type"].endswith(":bundle-source")


@pytest.mark.parametrize(
    "bundle",
    ["file://host/share/expert", "\\\\host\\share", "relative/expert", "~/expert", "/\0", ""],
)
async def test_what_is_no_place_is_refused(bundle: str, stack: Any) -> None:
    assert (await refused(stack, bundle))["type"].endswith(":bundle-not-found")


async def test_a_link_that_stays_inside_is_followed(stack: Any, bundles: TinyBundles) -> None:
    link = bundles.substrate.parent / "current"
    if not link.is_symlink():
        link.symlink_to(bundles.experts["domain-0"])
    async with stack.client() as client:
        answer = await client.post(
            "/admin/forget-domains",
            json={"name": "a", "bundle": str(link)},
            headers={"Prefer": "wait=20"},
        )
        assert answer.status_code == 201


async def test_a_bundle_that_no_trusted_key_has_signed_changes_nothing(
    stack: Any, bundles: TinyBundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = make_key_pair(tmp_path, "trusted")
    policy = SignaturePolicy.build(None, [keys.public])
    store = BundleStore(str(tmp_path / "store"), signatures=policy)
    monkeypatch.setattr(stack.parts.operations, "_store", store)
    problem = await refused(stack, str(bundles.experts["domain-0"]))
    assert problem["type"].endswith(":bundle-signature")
    assert problem["title"] == "No trusted key has signed the bundle as it is"
    async with stack.client() as client:
        assert (await client.get("/admin/status")).json()["epoch"] == 0


async def test_a_url_below_a_source_is_imported(
    stack: Any, bundles: TinyBundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = ImportPolicy(sources=("memory://experts",))
    monkeypatch.setattr(stack.runtime, "sources", policy)
    store = BundleStore(str(stack.parts.operations._store._root), imports=policy)
    monkeypatch.setattr(stack.parts.operations, "_store", store)
    memory = fsspec.filesystem("memory")
    memory.put(f"{bundles.experts['domain-0']}/", "/experts/domain-0/", recursive=True)
    try:
        async with stack.client() as client:
            answer = await client.post(
                "/admin/forget-domains",
                json={"name": "a", "bundle": "memory://experts/domain-0"},
            )
    finally:
        memory.store.clear()
    assert answer.status_code == 201
    assert len(stack.engine.switches) == 1


async def test_names_and_places_are_bounded(stack: Any) -> None:
    async with stack.client() as client:
        for body in (
            {"name": "a" * 5000, "bundle": "/x"},
            {"name": "a", "bundle": "/" + "x" * 5000},
            {"name": "a", "bundle": "/" + "x/" * 2000},
        ):
            answer = await client.post("/admin/forget-domains", json=body)
            assert answer.status_code == 422
            assert len(answer.content) < 2000
        answer = await client.get("/admin/forget-domains/" + "a" * 5000)
        assert answer.status_code == 404
    assert stack.engine.switches == []


async def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(stack: Any) -> None:
    async def chunks() -> Any:
        for _ in range(MAX_BODY_BYTES // 4096 + 1):
            yield b" " * 4096

    async with stack.client() as client:
        for content in (b" " * (MAX_BODY_BYTES + 1), chunks()):
            answer = await client.post("/admin/forget-domains", content=content)
            assert answer.status_code == 413
            assert answer.json()["type"].endswith(":body-too-large")
            assert answer.headers["x-request-id"]
        whole = json.dumps({"name": "a", "bundle": "/none"}).encode().ljust(MAX_BODY_BYTES)
        is_json = {"Content-Type": "application/json"}
        answer = await client.post("/admin/forget-domains", content=whole, headers=is_json)
        assert answer.json()["type"].endswith(":bundle-source")


async def test_without_a_token_no_body_is_read(stack: Any) -> None:
    async with stack.client(Authorization="Bearer wrong") as client:
        answer = await client.post("/admin/forget-domains", content=b" " * (MAX_BODY_BYTES + 1))
        assert answer.status_code == 401
