"""The first schema: deployment, changes, replicas, idempotency keys."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Creates all tables."""
    op.create_table(
        "deployment",
        sa.Column("id", sa.SmallInteger, primary_key=True, autoincrement=False),
        sa.Column("base_model_fingerprint", sa.String(64), nullable=False),
        sa.Column("substrate_digest", sa.String(71), nullable=False),
        sa.Column("created_at", _TIME, nullable=False),
        sa.CheckConstraint("id = 1", name="deployment_is_one_row"),
    )
    op.create_table(
        "changes",
        sa.Column("epoch", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("operation_id", sa.String(64), nullable=False, unique=True),
        sa.Column("action", sa.String(16), nullable=False),
        sa.Column("domain", sa.String(63), nullable=False, index=True),
        sa.Column("bundle_digest", sa.String(71)),
        sa.Column("slot", sa.Integer, nullable=False),
        sa.Column("in_flight", sa.String(16), nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("request_id", sa.String(128)),
        sa.Column("reason", sa.String(200)),
        sa.Column("requested_at", _TIME, nullable=False),
        sa.CheckConstraint("epoch >= 1", name="changes_epoch_from_1"),
        sa.CheckConstraint("slot >= 0", name="changes_slot_from_0"),
        sa.CheckConstraint("in_flight IN ('recompute', 'abort')", name="changes_in_flight"),
        sa.CheckConstraint(
            "(action = 'activate' AND bundle_digest IS NOT NULL)"
            " OR (action = 'revoke' AND bundle_digest IS NULL)",
            name="changes_action",
        ),
    )
    op.create_table(
        "replicas",
        sa.Column("replica_id", sa.String(64), primary_key=True),
        sa.Column("base_model_fingerprint", sa.String(64), nullable=False),
        sa.Column("substrate_digest", sa.String(71), nullable=False),
        sa.Column("applied_epoch", sa.BigInteger, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("last_error", sa.String(64)),
        sa.Column("lease_expires_at", _TIME),
        sa.Column("seen_at", _TIME, nullable=False),
        sa.CheckConstraint("applied_epoch >= 0", name="replicas_applied_epoch_from_0"),
        sa.CheckConstraint("state IN ('starting', 'serving', 'failed')", name="replicas_state"),
    )
    op.create_table(
        "idempotency_keys",
        sa.Column("key", sa.String(255), primary_key=True),
        sa.Column("request_digest", sa.String(71), nullable=False),
        sa.Column(
            "operation_id",
            sa.String(64),
            sa.ForeignKey("changes.operation_id", name="idempotency_keys_operation"),
            nullable=False,
        ),
        sa.Column("expires_at", _TIME, nullable=False, index=True),
    )
