"""What `alter serve` trusts: whose bundles, from where, and by which door changes come in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pydantic_settings import BaseSettings

from alter_core.errors import ConfigError
from server.admin_port import DEFAULT_ADMIN_HOST, AdminPort
from server.flag_values import split
from server.registry.store import ImportPolicy
from server.signatures import SignatureMode, SignaturePolicy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Security:
    """See the module. By default nobody's signature is asked for, and bundles may come from nowhere."""

    signatures: SignaturePolicy = dataclasses.field(default_factory=SignaturePolicy)
    sources: ImportPolicy = dataclasses.field(default_factory=ImportPolicy)
    """Where bundles that a request of `/admin` names may lie."""
    admin_port: AdminPort | None = None
    """None: `/admin` is on the port that serves."""

    @classmethod
    def build(
        cls, flags: SecurityFlags, environment: SecurityEnvironment, substrate: Path
    ) -> Security:
        """Fills what no flag gives. Without sources, those beside `substrate`. Raises: ConfigError."""
        keys = flags.trusted_keys or tuple(map(Path, split(environment.trusted_keys)))
        sources = flags.bundle_sources or split(environment.bundle_sources)
        return cls(
            signatures=SignaturePolicy.build(flags.signatures or environment.signatures, keys),
            sources=_sources(sources) if sources else _beside(substrate),
            admin_port=_admin_port(flags, environment),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SecurityFlags:
    """Flags of `alter serve`; None and empty are not given."""

    signatures: SignatureMode | None = None
    trusted_keys: tuple[Path, ...] = ()
    bundle_sources: tuple[str, ...] = ()
    """Folders and URLs."""
    admin_port: int | None = None
    admin_host: str | None = None
    admin_certfile: Path | None = None
    admin_keyfile: Path | None = None
    admin_client_ca: Path | None = None


class SecurityEnvironment(BaseSettings):
    """The ALTER_* variables of the same names; lists are separated by commas."""

    signatures: SignatureMode | None = None
    trusted_keys: str = ""
    bundle_sources: str = ""
    admin_port: int | None = None
    admin_host: str | None = None
    admin_certfile: Path | None = None
    admin_keyfile: Path | None = None
    admin_client_ca: Path | None = None
    ca_file: Path | None = None
    """Of the client: authorities that it trusts, in place of the system's."""
    client_cert: Path | None = None
    """Of the client: what it shows."""
    client_key: Path | None = None
    """Of the client: its private key, if it is another file."""


def _admin_port(flags: SecurityFlags, environment: SecurityEnvironment) -> AdminPort | None:
    port = flags.admin_port if flags.admin_port is not None else environment.admin_port
    host = flags.admin_host or environment.admin_host
    certfile = flags.admin_certfile or environment.admin_certfile
    keyfile = flags.admin_keyfile or environment.admin_keyfile
    client_ca = flags.admin_client_ca or environment.admin_client_ca
    if port is not None:
        return AdminPort(
            port=port,
            host=host or DEFAULT_ADMIN_HOST,
            certfile=certfile,
            keyfile=keyfile,
            client_ca=client_ca,
        )
    if host or certfile or keyfile or client_ca:
        raise ConfigError(
            "Options of the admin port are given, but no port",
            expected="an admin port",
            got="none",
            fix="Set --alter-admin-port; for the port that serves, use --host and --ssl-*.",
        )
    return None


def _sources(texts: tuple[str, ...]) -> ImportPolicy:
    return ImportPolicy(
        sources=tuple(text for text in texts if "://" in text),
        folders=tuple(Path(text).expanduser().absolute() for text in texts if "://" not in text),
    )


def _beside(substrate: Path) -> ImportPolicy:
    folder = substrate.parent
    return ImportPolicy() if folder == Path(folder.anchor) else ImportPolicy(folders=(folder,))
