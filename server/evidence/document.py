"""The facts about one unlearning request, as JSON in an envelope (DSSE, Dead Simple Signing Envelope).

The envelope's payload is canonical JSON of type PAYLOAD_TYPE; its signatures are by an elliptic-curve key. It
holds digests, names and figures: no text.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key, load_pem_public_key
from securesystemslib.dsse import Envelope
from securesystemslib.exceptions import Error as EnvelopeError
from securesystemslib.signer import CryptoSigner, SSlibKey

from alter_core.bundle import canonical_json
from alter_core.errors import ConfigError, EvidenceError
from alter_core.substrate import Substrate
from server.audit import AuditRecord, Head
from server.operations import Operation
from server.registry import Replica
from server.requests.records import UnlearningRequest

PAYLOAD_TYPE = "application/vnd.alter-server.evidence.v1+json"

_UNSHOWN = frozenset(("workspace", "row_digests", "figures", "progress", "num_attempts"))
"""Of a request: what is of no use outside, or stands elsewhere in the document."""


def evidence_of(
    request: UnlearningRequest,
    substrate: Substrate,
    *,
    operation: Operation | None,
    applied_digest: str | None,
    head: int,
    replicas: Sequence[Replica],
    audit_head: Head,
    audit_records: Sequence[AuditRecord],
    issued_by: str,
    now: datetime,
) -> dict[str, Any]:
    """The document, as things are now.

    `applied_digest`: of the expert that this server applies under the domain's name; `audit_records`: of its
    log, those of the request; `issued_by`: its id.
    """
    asked = {
        field.name: _plain(getattr(request, field.name))
        for field in dataclasses.fields(request)
        if field.name not in _UNSHOWN
    }
    activation = None
    if operation is not None:
        activation = {
            "operation_id": operation.change.operation_id,
            "epoch": operation.change.epoch,
            "recorded_at": _plain(operation.change.requested_at),
            "state": operation.state,
            "applies_now": applied_digest == request.bundle_digest,
        }
    return {
        "issued_at": _plain(now),
        "issued_by": issued_by,
        "request": asked,
        "expert": {
            "bundle_digest": request.bundle_digest,
            "substrate_digest": substrate.digest,
            "base_model": substrate.base_model.name,
            "base_model_fingerprint": substrate.base_model.fingerprint,
        },
        "evaluation": request.figures,
        "activation": activation,
        "fleet": {
            "epoch": head,
            "replicas": [
                {
                    "replica_id": each.replica_id,
                    "state": each.state,
                    "applied_epoch": each.applied_epoch,
                    "may_generate": each.holds_lease,
                }
                for each in replicas
            ],
        },
        "audit": {
            "head": str(audit_head),
            "records": [dataclasses.asdict(record) for record in audit_records],
        },
    }


def signed(document: Mapping[str, Any], private_key: Path | None) -> dict[str, Any]:
    """The envelope; without a key it is not signed. Raises: ConfigError for a key that cannot be used."""
    envelope = Envelope(canonical_json(document), PAYLOAD_TYPE, {})
    if private_key is not None:
        try:
            key = load_pem_private_key(private_key.read_bytes(), password=None)
            envelope.sign(CryptoSigner(key))
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm, EnvelopeError) as error:
            raise _bad_key(private_key, "private", error) from error
    return dict(envelope.to_dict())


def read_envelope(text: str | bytes) -> dict[str, Any]:
    """An envelope as it was saved. Raises: EvidenceError."""
    try:
        found = json.loads(text)
        envelope = _envelope(found)
        if envelope.payload_type != PAYLOAD_TYPE:
            raise ValueError(envelope.payload_type)
        json.loads(envelope.payload)
    except (ValueError, KeyError, TypeError, EnvelopeError) as error:
        raise EvidenceError(
            "This is no evidence of ALTER",
            expected=f"an envelope with a payload of type {PAYLOAD_TYPE}",
            got=type(error).__name__,
            fix="Give the file that `alter evidence get` wrote.",
        ) from error
    return dict(found)


def payload_of(envelope: Mapping[str, Any]) -> dict[str, Any]:
    """The document, whoever has signed it."""
    document: dict[str, Any] = json.loads(_envelope(envelope).payload)
    return document


def verified(envelope: Mapping[str, Any], public_keys: Sequence[Path]) -> dict[str, Any]:
    """The document, if one of the keys has signed it. Raises: EvidenceError, ConfigError for a key."""
    keys = []
    for path in public_keys:
        try:
            keys.append(SSlibKey.from_crypto(load_pem_public_key(path.read_bytes())))
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm, EnvelopeError) as error:
            raise _bad_key(path, "public", error) from error
    try:
        _envelope(envelope).verify(keys, threshold=1)
    except (EnvelopeError, ValueError) as error:
        raise EvidenceError(
            "This evidence is not signed with a key that was given",
            expected=f"a signature by one of {len(keys)} keys",
            got=f"{len(envelope.get('signatures', []))} signatures, none of which verifies",
            fix="It was changed, or signed by somebody else: do not rely on it.",
        ) from error
    return payload_of(envelope)


def _envelope(found: Mapping[str, Any]) -> Envelope:
    return Envelope.from_dict(copy.deepcopy(dict(found)))  # which takes out what it reads


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="microseconds")
    return value


def _bad_key(path: Path, kind: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"The {kind} key {path} cannot be used",
        expected=f"a PEM file of a {kind} key on P-256 or P-384, without a password",
        got=type(error).__name__,
        fix="Make a pair with: openssl ecparam -name prime256v1 -genkey -noout -out private.pem; "
        "openssl ec -in private.pem -pubout -out public.pem",
    )
