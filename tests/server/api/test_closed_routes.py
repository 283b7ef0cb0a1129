"""Routes of vLLM beside `/admin` that reach into the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from server.api.closed_routes import CLOSED_ROUTES


@pytest.mark.anyio
async def test_closed_routes_do_not_reach_the_application(
    make_stack: Callable[..., Any],
) -> None:
    stack = await make_stack()
    async with stack.client() as client:
        for path in sorted(CLOSED_ROUTES):
            for method in ("GET", "POST"):
                answer = await client.request(method, path)
                assert answer.status_code == 404
                assert answer.json()["error"]["type"] == "NotFoundError"
        assert (await client.post("/v1/anything")).json() == {"path": "v1/anything"}


def test_every_route_that_vllm_opens_for_development_is_closed() -> None:
    from vllm.entrypoints.rl.online.api_router import router as online_training
    from vllm.entrypoints.serve.dev.cache.api_router import router as cache
    from vllm.entrypoints.serve.dev.rpc.api_router import router as rpc
    from vllm.entrypoints.serve.dev.server_info.api_router import router as server_info
    from vllm.entrypoints.serve.dev.sleep.api_router import router as sleep
    from vllm.entrypoints.serve.elastic_ep.api_router import router as elastic
    from vllm.entrypoints.serve.fault_tolerance.api_router import router as fault_tolerance
    from vllm.entrypoints.serve.profile.api_router import router as profile

    routers = (online_training, cache, rpc, server_info, sleep, elastic, fault_tolerance, profile)
    paths = {route.path for router in routers for route in router.routes}  # type: ignore[attr-defined]
    assert len(paths) > 20
    assert paths <= CLOSED_ROUTES
