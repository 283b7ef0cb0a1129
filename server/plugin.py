"""The way into vLLM's server: an entry point of `vllm.endpoint_plugins`, named in VLLM_PLUGINS."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.datastructures import State

from alter_core.errors import ConfigError, UnsupportedEngineError
from alter_core.substrate import Substrate
from server.api.app import attach
from server.audit import AuditLog
from server.base_answers import BaseAnswers
from server.metrics import AlterMetrics
from server.parts import Parts, job_runner, open_registry, open_store, request_service
from server.settings import ServeSettings
from server.tokens import TokenStore
from server.tracing import open_tracing

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient

logger = logging.getLogger(__name__)


class AlterEndpointPlugin:
    """Adds `/admin` and the epoch to vLLM's application, and opens it once the engine is proven.

    An error in `init_state` stops vLLM's server before it listens.
    """

    name = "alter"
    required_tasks: tuple[str, ...] | None = None
    """Needed whatever the model can do: without the plugin nothing would be refused."""

    def attach_router(self, app: FastAPI) -> None:
        """See vLLM's `EndpointPlugin`."""
        attach(app)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """See vLLM's `EndpointPlugin`.

        Raises: ConfigError, UnsupportedEngineError, BundleError, DomainError, EngineError, RegistryError,
        AuditError.
        """
        settings = getattr(args, "alter_settings", None)
        if not isinstance(settings, ServeSettings):
            raise ConfigError(
                "ALTER's plugin is loaded, but not configured",
                expected="a server that was started with `alter serve`",
                got="a server that was started in another way",
                fix="Use `alter serve MODEL --alter-substrate DIR`.",
            )
        if engine_client is None:
            raise UnsupportedEngineError(
                "This server has no engine", expected="vLLM's API server", got="its render server"
            )
        from server.engine.prompts import VllmPrompts
        from server.engine.vllm_engine import VllmForgetEngine
        from server.engine.writer import VllmWriter

        audit_log = AuditLog.open(settings.audit_log)
        substrate = settings.security.signatures.read(settings.substrate, Substrate.read)
        parts = Parts.over(
            VllmForgetEngine(engine_client),
            substrate,
            open_registry(settings, substrate),
            open_store(settings, substrate),
            settings.cache,
            max_domains=settings.max_domains,
            metrics=AlterMetrics(),
            audit_log=audit_log,
            tracing=open_tracing(getattr(args, "otlp_traces_endpoint", None)),
        )
        prompts = VllmPrompts(state)
        writer, model = VllmWriter(engine_client, prompts), Path(engine_client.model_config.model)
        requests = request_service(
            parts,
            settings.requests,
            settings.workspace,
            job_runner(),
            model=model,
            substrate=settings.substrate,
            writer=writer,
        )
        state.alter.open(
            parts,
            settings.admin_token_sha256,
            tokens=None if settings.tokens_file is None else TokenStore(settings.tokens_file),
            audit=audit_log,
            requires_if_match=settings.require_if_match,
            sources=settings.security.sources,
            prompts=prompts,
            writer=writer,
            base_answers=BaseAnswers(model) if settings.base_answers else None,
            requests=requests,
            max_upload_bytes=settings.requests.max_upload_mib * 2**20,
        )
        await parts.start(settings.domains)
        requests.start()
        if (where := settings.security.admin_port) is not None:
            state.alter.listen_apart(where, args.alter_admin_listener)
        logger.info(
            "Epoch %d: %d forget domains are active",
            parts.service.epoch,
            len(parts.service.list()),
        )
