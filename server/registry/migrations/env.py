"""Alembic's entry: runs the migrations on the connection that `upgrade` hands over."""

from alembic import context

from server.registry.migrations import VERSION_TABLE
from server.registry.schema import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
