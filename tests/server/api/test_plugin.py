"""The plugin on vLLM's own, unmodified application. No engine runs, and nothing is generated."""

from __future__ import annotations

import asyncio
from argparse import Namespace
from pathlib import Path
from unittest.mock import MagicMock

import httpx
import pytest
from fastapi import FastAPI
from prometheus_client import REGISTRY, CollectorRegistry

from alter_core.errors import ConfigError, UnsupportedEngineError
from server import launch
from server import plugin as plugin_module
from server.api.closed_routes import CLOSED_ROUTES
from server.audit import AuditLog
from server.metrics import AlterMetrics
from server.plugin import AlterEndpointPlugin
from server.settings import ServeSettings, token_digest
from server.tokens import TokenStore
from tests.support.tiny import TinyBundles

from .conftest import AUTHORIZATION, MAX_DOMAINS, TOKEN, InMemoryEngine, Site


def build_vllm_app(monkeypatch: pytest.MonkeyPatch, *flags: str) -> FastAPI:
    monkeypatch.setenv("VLLM_PLUGINS", "alter")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm.entrypoints.launchers.app import build_app

    app: FastAPI = build_app(launch.parse_vllm_args("/m", flags), ("generate",), None)
    return app


def client_of(app: FastAPI, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://alter", headers=headers)


def test_vllm_finds_the_plugin_and_its_application_is_ours_too(
    monkeypatch: pytest.MonkeyPatch, site: Site
) -> None:
    app = build_vllm_app(monkeypatch, "--api-key", "key", "--root-path", "/proxy")
    metrics = AlterMetrics()

    async def run() -> None:
        server = site.replica(metrics=metrics)
        engine = server.engine
        app.state.alter.open(server.parts, token_digest(TOKEN))
        await server.parts.start({})
        async with client_of(app, **AUTHORIZATION) as client:
            # vLLM's exception handlers stay out of /admin, and ours out of /v1.
            # With and without a proxy that takes the root path off.
            for prefix in ("", "/proxy"):
                for path, status in (("/admin/forget-domains", 422), ("/admin/nothing", 404)):
                    response = await client.post(prefix + path, json={})
                    assert response.status_code == status
                    assert response.headers["content-type"] == "application/problem+json"
                    assert response.json()["instance"] == "/proxy" + path
            # vLLM's own key guards /v1, and not /admin.
            assert (await client.post("/v1/completions", json={})).status_code == 401
            assert (await client.get("/admin/status")).status_code == 200
            key = {"Authorization": "Bearer key"}
            response = await client.post("/v1/completions", json={}, headers=key)
            assert response.status_code == 400
            assert "error" in response.json()
            assert response.headers["x-alter-epoch"] == "0"
            assert (await client.get("/admin/status", headers=key)).status_code == 401

            for path in ("/health/live", "/health/ready"):
                assert (await client.get(path)).status_code == 200
            engine.counts[None] = (1, 41)
            exposition = (await client.get("/metrics")).text
            assert 'alter_routed_tokens_total{expert="retain",path="low"} 41.0' in exposition
            assert "alter_epoch 0.0" in exposition
            assert 'handler="/admin/forget-domains"' in exposition

            paths = (await client.get("/openapi.json")).json()["paths"]
            assert "/admin/forget-domains/{name}" in paths
            assert "/v1/chat/completions" in paths

            engine.is_trusted = False
            for path in ("/v1/completions", "/v1/responses", "/invocations", "/tokenize"):
                response = await client.post(path, json={}, headers=key)
                assert response.status_code == 503, path
                assert response.json()["error"]["type"] == "ServiceUnavailableError"

    try:
        asyncio.run(run())
    finally:
        for collector in vars(metrics).values():
            REGISTRY.unregister(collector)


def test_every_route_of_vllm_that_may_generate_is_refused_without_trust(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_SERVER_DEV_MODE", "1")
    app = build_vllm_app(monkeypatch, "--enable-scale-out")
    open_paths = {
        "/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc", "/load",
        "/metrics", "/version", "/v1/models", "/admin", "/console", "/health/live",
    }  # fmt: skip

    async def run() -> None:
        async with client_of(app) as client:
            for route in app.routes:
                path = getattr(route, "path", "")
                if path in open_paths:
                    continue
                for method in getattr(route, "methods", None) or {"POST"}:
                    response = await client.request(method, path)
                    expected = 404 if path in CLOSED_ROUTES else 503
                    assert response.status_code == expected, path

    asyncio.run(run())


def test_state_needs_settings_and_an_engine(bundles: TinyBundles) -> None:
    plugin = AlterEndpointPlugin()
    app = FastAPI()
    plugin.attach_router(app)
    with pytest.raises(ConfigError, match="alter serve"):
        asyncio.run(plugin.init_state(None, app.state, Namespace()))
    settings = Namespace(alter_settings=ServeSettings(substrate=Path(bundles.substrate)))
    with pytest.raises(UnsupportedEngineError, match="render"):
        asyncio.run(plugin.init_state(None, app.state, settings))


def test_the_start_is_recorded_and_the_tokens_file_is_used(
    bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from server.engine import vllm_engine

    metrics = AlterMetrics(CollectorRegistry())
    monkeypatch.setattr(plugin_module, "AlterMetrics", lambda: metrics)
    monkeypatch.setattr(vllm_engine, "VllmForgetEngine", lambda _: InMemoryEngine(MAX_DOMAINS))
    token = TokenStore(tmp_path / "tokens.json").create("alice", "operator")
    settings = ServeSettings(
        substrate=bundles.substrate,
        domains={"a": bundles.experts["domain-0"]},
        max_domains=MAX_DOMAINS,
        tokens_file=tmp_path / "tokens.json",
        audit_log=tmp_path / "audit.sqlite",
    )
    app = FastAPI()
    plugin = AlterEndpointPlugin()
    plugin.attach_router(app)

    async def run() -> None:
        args = Namespace(alter_settings=settings)
        await plugin.init_state(MagicMock(), app.state, args)
        async with client_of(app, Authorization=f"Bearer {token}") as client:
            client.headers["Prefer"] = "wait=20"
            assert (await client.delete("/admin/forget-domains/a")).status_code == 200
            assert (await client.delete("/admin/forget-domains/A")).status_code == 404
        # As when the server stops.
        async with app.router.lifespan_context(app):
            assert app.state.alter.is_serving
        assert not app.state.alter.is_serving

    asyncio.run(run())
    records = AuditLog.open_to_read(settings.audit_log).records()
    # What is applied is recorded beside what was asked for.
    assert sorted((r.actor, r.action, r.outcome) for r in records) == sorted([
        ("server", "start", "begun"),
        ("server", "start", "done"),
        ("server", "activate", "begun"),
        ("server", "activate", "created"),
        ("server", "apply", "done"),
        ("alice", "revoke", "begun"),
        ("alice", "revoke", "revoked"),
        ("alice", "apply", "done"),
        ("alice", "revoke", "refused"),
    ])  # fmt: skip


def test_vllm_takes_it_for_an_endpoint_plugin() -> None:
    from vllm.plugins.endpoint_plugins.interface import EndpointPlugin

    plugin = AlterEndpointPlugin()
    assert isinstance(plugin, EndpointPlugin)
    assert plugin.required_tasks is None
