"""The server as an application of Ray Serve: replicas that each are a whole server, on one registry.

    serve run deploy/ray-serve.yaml

Ray Serve starts replicas, spreads requests over them and ends them; which experts apply is between them and
the registry, as in every other fleet. A replica that may not generate answers 503 until it may again, and
`/admin` is answered by whichever replica a request gets to.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve

from alter_core.errors import EngineError
from server.api.runtime import AlterRuntime
from server.launch import application, prepare
from server.settings import ENV_PREFIX, ServeSettings

MAX_ONGOING_REQUESTS = 1024
"""Of a replica: vLLM queues them better than Serve does."""


class Arguments(BaseModel):
    """`args` of the application in a Serve config file."""

    model_config = ConfigDict(extra="forbid")

    model: str
    """Folder or hub name, on every node."""
    vllm_args: list[str] = Field(default_factory=list)
    """vLLM's own flags."""
    environment: dict[str, str] = Field(default_factory=dict)
    """ALTER_* variables of every replica; secrets by their *_FILE variants."""
    deployment: dict[str, Any] = Field(default_factory=dict)
    """Options of Ray Serve's deployment, e.g. `num_replicas` and `ray_actor_options`."""

    @field_validator("environment")
    @classmethod
    def _is_ours(cls, environment: dict[str, str]) -> dict[str, str]:
        if others := [name for name in environment if not name.startswith(ENV_PREFIX)]:
            raise ValueError(
                f"{', '.join(others)}: no {ENV_PREFIX}* variable; set it in ray_actor_options.runtime_env"
            )
        return environment


class AlterReplica:
    """One server, with an engine of its own."""

    async def __init__(self, arguments: Arguments) -> None:  # type: ignore[misc]
        os.environ.update(arguments.environment)
        args = prepare(arguments.model, ServeSettings.build(), arguments.vllm_args)
        self._stack = contextlib.AsyncExitStack()
        self._app = await self._stack.enter_async_context(application(args))

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    async def check_health(self) -> None:
        """Raises: EngineError if only a restart helps, which Ray Serve then does."""
        runtime: AlterRuntime = self._app.state.alter
        if not runtime.is_sound:
            raise EngineError("This replica cannot prove which experts it applies")

    async def __del__(self) -> None:
        await self._stack.aclose()


def build(args: dict[str, Any]) -> serve.Application:
    """What a Serve config file imports; `args` are as `Arguments`. Raises: ValidationError."""
    arguments = Arguments.model_validate(args)
    deployment = serve.deployment(
        name="alter", max_ongoing_requests=MAX_ONGOING_REQUESTS, graceful_shutdown_timeout_s=60
    )(serve.ingress()(AlterReplica))
    return deployment.options(**arguments.deployment).bind(arguments)
