"""Puts one server's parts together, over any engine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Mapping
from pathlib import Path

from prometheus_client import CollectorRegistry

from alter_core.substrate import Substrate, max_expert_bytes
from server.audit import AuditLog
from server.domains import DomainService
from server.engine.base import ForgetEngine, Writer
from server.lease import Clock, boot_clock
from server.metrics import AlterMetrics, ServerState
from server.operations import OperationService
from server.reconciler import Reconciler
from server.registry import BundleStore, Deployment, Registry
from server.requests.book import RequestBook
from server.requests.jobs import JobRunner, LocalJobs
from server.requests.ray_jobs import RayJobs
from server.requests.service import RequestService
from server.requests.settings import RequestSettings
from server.requests.workspace import Workspace
from server.settings import ServeSettings
from server.tracing import NO_TRACING, Tracing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What works together in one server."""

    substrate: Substrate
    service: DomainService
    registry: Registry
    reconciler: Reconciler
    operations: OperationService
    metrics: AlterMetrics
    audit_log: AuditLog | None
    """None: nothing is recorded; for tests."""
    tracing: Tracing

    @classmethod
    def over(
        cls,
        engine: ForgetEngine,
        substrate: Substrate,
        registry: Registry,
        store: BundleStore,
        cache: Path,
        *,
        max_domains: int,
        metrics: AlterMetrics | None = None,
        audit_log: AuditLog | None = None,
        tracing: Tracing = NO_TRACING,
        clock: Clock = boot_clock,
    ) -> Parts:
        """A server over an engine that nobody else switches. To be used on the running event loop."""
        metrics = metrics or AlterMetrics(CollectorRegistry())
        metrics.set_info(
            version=importlib.metadata.version("alter-server"), substrate=str(substrate.digest)
        )
        if audit_log is not None:
            audit_log.on_failure.append(metrics.count_audit_failure)
        service = DomainService(
            engine, substrate, max_domains, metrics=metrics, audit_log=audit_log, tracing=tracing
        )
        reconciler = Reconciler(service, registry, store, cache, metrics=metrics, clock=clock)
        operations = OperationService(
            registry,
            store,
            reconciler,
            substrate,
            audit_log=audit_log,
            metrics=metrics,
            tracing=tracing,
        )
        return cls(
            substrate=substrate,
            service=service,
            registry=registry,
            reconciler=reconciler,
            operations=operations,
            metrics=metrics,
            audit_log=audit_log,
            tracing=tracing,
        )

    async def observe(self) -> None:
        """Brings the metrics up to date, for a scrape. Never raises."""
        await self.service.collect_routed_tokens()
        self.metrics.set_server(
            ServerState(
                desired_epoch=self.reconciler.head,
                is_ready=self.reconciler.is_ready,
                is_trusted=self.service.is_trusted,
                is_registry_up=self.reconciler.is_registry_up,
                lease_left_s=self.reconciler.lease_left_s,
                lease_s=self.registry.lease_s,
                num_owed=0 if self.audit_log is None else self.audit_log.num_owed,
            )
        )

    async def start(self, domains: Mapping[str, Path]) -> None:
        """Proves the engine, records `domains`, applies what is to be active, and goes on doing so.

        Raises: CanaryError, EngineError, BundleError, DomainError, RegistryError, AuditError; the server
        must not start.
        """
        await self.service.start()
        await self.operations.ensure(domains)
        await self.reconciler.start()

    async def stop(self) -> None:
        """Stops generating, leaves the fleet and closes the registry."""
        await self.reconciler.stop()
        self.registry.close()


def deployment_of(substrate: Substrate) -> Deployment:
    """What the servers of one registry must have in common. The substrate was read from a bundle."""
    assert substrate.digest is not None
    return Deployment(
        base_model_fingerprint=substrate.base_model.fingerprint, substrate_digest=substrate.digest
    )


def request_service(
    parts: Parts,
    settings: RequestSettings,
    workspace: Path,
    jobs: JobRunner,
    *,
    model: Path,
    substrate: Path,
    writer: Writer | None = None,
) -> RequestService:
    """What takes unlearning requests. `model`, `substrate`: folders that jobs read."""
    return RequestService(
        RequestBook(parts.registry.database),
        Workspace(workspace),
        parts.operations,
        jobs,
        settings,
        model=model,
        substrate=substrate,
        may_generate=lambda: parts.reconciler.may_generate,
        epoch=lambda: parts.service.epoch,
        writer=writer,
        audit_log=parts.audit_log,
    )


def job_runner() -> JobRunner:
    """Ray where RAY_ADDRESS names a cluster, else processes of this machine. Raises: ConfigError."""
    address = os.environ.get("RAY_ADDRESS")
    return RayJobs(address) if address else LocalJobs()


def open_registry(settings: ServeSettings, substrate: Substrate) -> Registry:
    """Joins the registry, or founds it.

    Raises: ConfigError, RegistrySchemaError, RegistryMismatchError, RegistryUnavailableError.
    """
    deployment = deployment_of(substrate)
    return Registry.open(
        settings.registry_url(deployment.substrate_digest),
        deployment,
        max_domains=settings.max_domains,
        lease_s=settings.lease_s,
    )


def open_store(settings: ServeSettings, substrate: Substrate) -> BundleStore:
    """The store, which takes and gives only bundles that this server may use. Raises: ConfigError."""
    return BundleStore(
        settings.store_url,
        imports=settings.security.sources,
        signatures=settings.security.signatures,
        max_bundle_bytes=max_expert_bytes(substrate),
    )
