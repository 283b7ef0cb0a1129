"""Brings a database to the schema of this version: Alembic, run by the server itself."""

from __future__ import annotations

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from alter_core.errors import RegistrySchemaError

VERSION_TABLE = "alter_registry_version"


def upgrade(connection: Connection) -> None:
    """Applies what is missing, within the connection's transaction; nothing if nothing is.

    The caller holds a lock that keeps other servers from doing the same.
    Raises: RegistrySchemaError if the database is at a version that this code does not know.
    """
    config = Config()
    config.set_main_option("script_location", "server.registry:migrations")
    config.attributes["connection"] = connection
    scripts = ScriptDirectory.from_config(config)
    known = {revision.revision for revision in scripts.walk_revisions()}
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    current = context.get_current_heads()
    if unknown := set(current) - known:
        raise RegistrySchemaError(
            "The registry's database is at a newer schema than this version of ALTER knows",
            expected=f"schema {scripts.get_current_head()} or older",
            got=f"schema {', '.join(sorted(unknown))}",
            fix="Start the version of ALTER that upgraded it, or a newer one.",
        )
    if set(current) != set(scripts.get_heads()):
        command.upgrade(config, "head")
