"""Collects what evidence says, from the registry and from this server."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from server.audit import AuditLog
from server.audit.record import EMPTY
from server.parts import Parts
from server.requests.service import RequestService

from .document import evidence_of, signed


async def issue(
    request_id: str, parts: Parts, requests: RequestService, audit_log: AuditLog | None
) -> dict[str, Any]:
    """The envelope, signed if the server has a key.

    Raises: RequestNotFoundError, RegistryUnavailableError, AuditError, ConfigError.
    """
    request = await requests.get(request_id)
    operation = await requests.operation(request)
    head, replicas = await parts.operations.fleet()
    applied = {domain.name: domain.digest for domain in parts.service.list()}
    records, audit_head = [], EMPTY
    if audit_log is not None:
        records = await asyncio.to_thread(audit_log.records_of, request.request_id or request.id)
        audit_head = await asyncio.to_thread(audit_log.head)
    document = evidence_of(
        request,
        parts.substrate,
        operation=operation,
        applied_digest=applied.get(request.domain),
        head=head,
        replicas=replicas,
        audit_head=audit_head,
        audit_records=records,
        issued_by=parts.reconciler.replica_id,
        now=datetime.now(UTC),
    )
    return await asyncio.to_thread(signed, document, requests.signing_key)
