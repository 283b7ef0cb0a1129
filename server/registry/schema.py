"""Tables of the registry. They hold names, digests and figures; no text that is to be forgotten.

deployment           which base model and substrate the registry belongs to; one row, and the log's lock
changes              the log: desired state at epoch E is what its first E rows add up to
replicas             what each server applies, and until when it may answer
idempotency_keys     which operation a key stands for
unlearning_requests  what is to become an expert, and how far it has come
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    DateTime,
    Dialect,
    ForeignKey,
    Integer,
    SmallInteger,
    String,
    TypeDecorator,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql.functions import FunctionElement

DIGEST_LENGTH = len("sha256:") + 64
FINGERPRINT_LENGTH = 64
DOMAIN_LENGTH = 63
ID_LENGTH = 64
"""Of an operation or a replica."""
KEY_LENGTH = 255
ACTOR_LENGTH = 128
REQUEST_ID_LENGTH = 128
REASON_LENGTH = 200
STATE_LENGTH = 16
ERROR_LENGTH = 64
REQUEST_STATE_LENGTH = 24

DEPLOYMENT_ID = 1


class UtcDateTime(TypeDecorator[datetime]):
    """An aware time in UTC, also on SQLite, which stores none of the zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class database_now(FunctionElement[datetime]):  # noqa: N801 (reads as the SQL function it is)
    """The database's clock as it is now, not as it was when the transaction began."""

    type = UtcDateTime()
    inherit_cache = True


@compiles(database_now, "postgresql")
def _postgresql_now(element: database_now, compiler: Any, **options: Any) -> str:
    return "clock_timestamp()"


@compiles(database_now, "sqlite")
def _sqlite_now(element: database_now, compiler: Any, **options: Any) -> str:
    return "strftime('%Y-%m-%d %H:%M:%f000', 'now')"


class Base(DeclarativeBase):
    """Of every table of the registry."""


class DeploymentRow(Base):
    """What every server of this registry must serve."""

    __tablename__ = "deployment"
    __table_args__ = (CheckConstraint(f"id = {DEPLOYMENT_ID}", name="deployment_is_one_row"),)

    id: Mapped[int] = mapped_column(SmallInteger, primary_key=True, autoincrement=False)
    base_model_fingerprint: Mapped[str] = mapped_column(String(FINGERPRINT_LENGTH))
    substrate_digest: Mapped[str] = mapped_column(String(DIGEST_LENGTH))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)


class ChangeRow(Base):
    """One change of the desired state. Never updated, never deleted."""

    __tablename__ = "changes"
    __table_args__ = (
        CheckConstraint("epoch >= 1", name="changes_epoch_from_1"),
        CheckConstraint("slot >= 0", name="changes_slot_from_0"),
        CheckConstraint("in_flight IN ('recompute', 'abort')", name="changes_in_flight"),
        CheckConstraint(
            "(action = 'activate' AND bundle_digest IS NOT NULL)"
            " OR (action = 'revoke' AND bundle_digest IS NULL)",
            name="changes_action",
        ),
    )

    epoch: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    operation_id: Mapped[str] = mapped_column(String(ID_LENGTH), unique=True)
    action: Mapped[str] = mapped_column(String(STATE_LENGTH))
    domain: Mapped[str] = mapped_column(String(DOMAIN_LENGTH), index=True)
    bundle_digest: Mapped[str | None] = mapped_column(String(DIGEST_LENGTH))
    slot: Mapped[int] = mapped_column(Integer)
    in_flight: Mapped[str] = mapped_column(String(STATE_LENGTH))
    actor: Mapped[str] = mapped_column(String(ACTOR_LENGTH))
    request_id: Mapped[str | None] = mapped_column(String(REQUEST_ID_LENGTH))
    reason: Mapped[str | None] = mapped_column(String(REASON_LENGTH))
    requested_at: Mapped[datetime] = mapped_column(UtcDateTime)


class ReplicaRow(Base):
    """One server process, as it last reported."""

    __tablename__ = "replicas"
    __table_args__ = (
        CheckConstraint("applied_epoch >= 0", name="replicas_applied_epoch_from_0"),
        CheckConstraint("state IN ('starting', 'serving', 'failed')", name="replicas_state"),
    )

    replica_id: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    base_model_fingerprint: Mapped[str] = mapped_column(String(FINGERPRINT_LENGTH))
    substrate_digest: Mapped[str] = mapped_column(String(DIGEST_LENGTH))
    applied_epoch: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(String(STATE_LENGTH))
    last_error: Mapped[str | None] = mapped_column(String(ERROR_LENGTH))
    lease_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime)


class IdempotencyRow(Base):
    """Which operation an idempotency key stands for, until it expires."""

    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(String(KEY_LENGTH), primary_key=True)
    request_digest: Mapped[str] = mapped_column(String(DIGEST_LENGTH))
    operation_id: Mapped[str] = mapped_column(
        String(ID_LENGTH), ForeignKey(ChangeRow.operation_id, name="idempotency_keys_operation")
    )
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class UnlearningRequestRow(Base):
    """One unlearning request: see `server.requests.records`."""

    __tablename__ = "unlearning_requests"

    id: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    workspace: Mapped[str] = mapped_column(String(ID_LENGTH), index=True)
    domain: Mapped[str] = mapped_column(String(DOMAIN_LENGTH), index=True)
    state: Mapped[str] = mapped_column(String(REQUEST_STATE_LENGTH))
    approval: Mapped[str] = mapped_column(String(STATE_LENGTH))
    question: Mapped[str | None] = mapped_column(String(REQUEST_STATE_LENGTH))
    approved_by: Mapped[str | None] = mapped_column(String(ACTOR_LENGTH))
    cancelled_by: Mapped[str | None] = mapped_column(String(ACTOR_LENGTH))
    allow_unknown: Mapped[bool] = mapped_column(Boolean)
    actor: Mapped[str] = mapped_column(String(ACTOR_LENGTH))
    request_id: Mapped[str | None] = mapped_column(String(REQUEST_ID_LENGTH))
    reason: Mapped[str | None] = mapped_column(String(REASON_LENGTH))
    deadline: Mapped[datetime | None] = mapped_column(UtcDateTime)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime)
    updated_at: Mapped[datetime] = mapped_column(UtcDateTime)
    forget_digest: Mapped[str] = mapped_column(String(DIGEST_LENGTH))
    num_rows: Mapped[int] = mapped_column(Integer)
    num_documents: Mapped[int] = mapped_column(Integer)
    retain_digest: Mapped[str] = mapped_column(String(DIGEST_LENGTH))
    num_retain_rows: Mapped[int] = mapped_column(Integer)
    row_digests: Mapped[list[str]] = mapped_column(JSON)
    num_attempts: Mapped[int] = mapped_column(Integer)
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    figures: Mapped[dict[str, Any]] = mapped_column(JSON)
    bundle_digest: Mapped[str | None] = mapped_column(String(DIGEST_LENGTH))
    operation_id: Mapped[str | None] = mapped_column(String(ID_LENGTH))
    error: Mapped[str | None] = mapped_column(String(ERROR_LENGTH))
    text_deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    idempotency_key: Mapped[str | None] = mapped_column(String(KEY_LENGTH), unique=True)
    request_digest: Mapped[str | None] = mapped_column(String(DIGEST_LENGTH))
