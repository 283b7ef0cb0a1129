"""`/admin` on a port of its own: there, behind TLS and client certificates, and nowhere else."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import anyio.to_thread
import httpx
import pytest

from alter_core.errors import ConfigError
from server.admin_port import AdminPort
from server.client import AdminClient
from server.security_options import client_tls
from tests.support.authority import Authority, Certificate

from .conftest import AUTHORIZATION, TOKEN

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"), "authority")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("other-ca"), "stranger")


@pytest.fixture(scope="module")
def certificate(authority: Authority) -> Certificate:
    return authority.issue("server")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.asynccontextmanager
async def listening(stack: Any, **options: Any) -> AsyncIterator[str]:
    where = AdminPort(port=free_port(), **options)
    stack.runtime.listen_apart(where, where.bind())
    try:
        yield f"http{'s' if where.certfile else ''}://127.0.0.1:{where.port}"
    finally:
        await stack.runtime.admin_server.close()


async def test_admin_is_on_its_port_and_not_on_the_one_that_serves(
    make_stack: Callable[..., Any],
) -> None:
    stack = await make_stack()
    async with stack.client() as serving:
        assert (await serving.get("/admin/status")).status_code == 200
        async with listening(stack) as url, httpx.AsyncClient(base_url=url) as own:
            for path in ("/admin/status", "/admin/forget-domains", "/admin/", "/admin/none"):
                for method in ("GET", "POST", "DELETE", "OPTIONS"):
                    answer = await serving.request(method, path, json={})
                    assert answer.status_code == 404
                    assert answer.json()["error"]["type"] == "NotFoundError"
            assert not any("/admin" in path for path in (await described(serving))["paths"])
            assert "/v1/wait" in (await described(serving))["paths"]

            assert (await own.get("/admin/status")).status_code == 401
            answer = await own.get("/admin/status", headers=AUTHORIZATION)
            assert answer.json()["status"] == "serving"
            assert set((await described(own))["paths"]) >= {"/admin/status"}
            for path in ("/v1/wait", "/v1/models", "/metrics", "/health", "/status", "/docs"):
                answer = await own.post(path, headers=AUTHORIZATION)
                assert answer.status_code == 404


async def described(client: httpx.AsyncClient) -> dict[str, Any]:
    schema: dict[str, Any] = (await client.get("/openapi.json")).json()
    return schema


async def test_only_clients_of_the_authority_reach_it_and_they_need_a_token(
    make_stack: Callable[..., Any],
    authority: Authority,
    stranger: Authority,
    certificate: Certificate,
) -> None:
    stack = await make_stack()
    tls = {
        "certfile": certificate.cert,
        "keyfile": certificate.key,
        "client_ca": authority.cert,
    }
    ours, theirs = authority.issue("alice"), stranger.issue("mallory")
    async with listening(stack, **tls) as url:

        def status(shown: Certificate | None, token: str | None = TOKEN) -> str:
            cert, key = (shown.cert, shown.key) if shown else (None, None)
            with AdminClient(url, token, tls=client_tls(authority.cert, cert, key)) as client:
                return client.status().status

        assert await anyio.to_thread.run_sync(status, ours) == "serving"
        with pytest.raises(ConfigError):
            await anyio.to_thread.run_sync(status, ours, None)
        for shown in (None, theirs):
            with pytest.raises(Exception, match=r"reach|connect|closed|TLS|SSL|disconnected"):
                await anyio.to_thread.run_sync(status, shown)
        with pytest.raises(httpx.HTTPError):
            await anyio.to_thread.run_sync(
                lambda: httpx.get(url.replace("https", "http") + "/admin/status")
            )


async def test_a_client_refuses_a_server_of_another_authority(
    make_stack: Callable[..., Any],
    authority: Authority,
    stranger: Authority,
    certificate: Certificate,
) -> None:
    stack = await make_stack()
    async with listening(stack, certfile=certificate.cert, keyfile=certificate.key) as url:

        def get(ca: Path) -> int:
            context = ssl.create_default_context(cafile=ca)
            return httpx.get(f"{url}/admin/status", verify=context).status_code

        assert await anyio.to_thread.run_sync(get, authority.cert) == 401
        with pytest.raises(httpx.ConnectError):
            await anyio.to_thread.run_sync(get, stranger.cert)


def test_what_cannot_be_used_stops_the_start(certificate: Certificate, tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("junk")
    port = free_port()
    for options in (
        {"port": 0},
        {"port": 65536},
        {"port": port, "keyfile": certificate.key},
        {"port": port, "client_ca": certificate.cert},
        {"port": port, "certfile": junk},
        {"port": port, "certfile": tmp_path / "none.pem"},
        {"port": port, "certfile": certificate.cert},
        {"port": port, "certfile": certificate.cert, "keyfile": certificate.cert},
        {
            "port": port,
            "certfile": certificate.cert,
            "keyfile": certificate.key,
            "client_ca": junk,
        },
    ):
        with pytest.raises(ConfigError) as caught:
            AdminPort(**options)  # type: ignore[arg-type]
        assert caught.value.fix
    with pytest.raises(ConfigError, match="cannot listen on 192\\.0\\.2\\.1"):
        AdminPort(port=port, host="192.0.2.1").bind()
    with contextlib.closing(AdminPort(port=port).bind()) as listener:
        listener.listen()
        with pytest.raises(ConfigError, match=f"port {port}"):
            AdminPort(port=port).bind()
