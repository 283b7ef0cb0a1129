"""Unlearning requests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Creates their table."""
    op.create_table(
        "unlearning_requests",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("workspace", sa.String(64), nullable=False, index=True),
        sa.Column("domain", sa.String(63), nullable=False, index=True),
        sa.Column("state", sa.String(24), nullable=False),
        sa.Column("approval", sa.String(16), nullable=False),
        sa.Column("question", sa.String(24)),
        sa.Column("approved_by", sa.String(128)),
        sa.Column("cancelled_by", sa.String(128)),
        sa.Column("allow_unknown", sa.Boolean, nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("request_id", sa.String(128)),
        sa.Column("reason", sa.String(200)),
        sa.Column("deadline", _TIME),
        sa.Column("created_at", _TIME, nullable=False),
        sa.Column("updated_at", _TIME, nullable=False),
        sa.Column("forget_digest", sa.String(71), nullable=False),
        sa.Column("num_rows", sa.Integer, nullable=False),
        sa.Column("num_documents", sa.Integer, nullable=False),
        sa.Column("retain_digest", sa.String(71), nullable=False),
        sa.Column("num_retain_rows", sa.Integer, nullable=False),
        sa.Column("row_digests", sa.JSON, nullable=False),
        sa.Column("num_attempts", sa.Integer, nullable=False),
        sa.Column("progress", sa.JSON),
        sa.Column("figures", sa.JSON, nullable=False),
        sa.Column("bundle_digest", sa.String(71)),
        sa.Column("operation_id", sa.String(64)),
        sa.Column("error", sa.String(64)),
        sa.Column("text_deleted_at", _TIME),
        sa.Column("idempotency_key", sa.String(255), unique=True),
        sa.Column("request_digest", sa.String(71)),
    )
