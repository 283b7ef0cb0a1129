"""Flags of `alter serve` for `server.security`, and of the client for TLS."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated

import typer

from alter_core.errors import ConfigError
from server.admin_port import DEFAULT_ADMIN_HOST
from server.signatures import SignatureMode

Signatures = Annotated[
    SignatureMode | None,
    typer.Option(
        "--alter-signatures",
        help="What becomes of bundles that no trusted key has signed: `require` refuses them, `warn` logs "
        "them. Default: `require` with trusted keys, else `off`. Environment: ALTER_SIGNATURES.",
    ),
]
TrustedKeys = Annotated[
    list[Path] | None,
    typer.Option(
        "--alter-trusted-keys",
        metavar="PEM",
        help="Public key whose signatures count, of substrate and experts; may be repeated. Environment: "
        "ALTER_TRUSTED_KEYS.",
    ),
]
BundleSources = Annotated[
    list[str] | None,
    typer.Option(
        "--alter-bundle-sources",
        metavar="DIR|URL",
        help="Where bundles that /admin is told to activate may lie; may be repeated. Default: the folder "
        "that the substrate lies in. Environment: ALTER_BUNDLE_SOURCES.",
    ),
]
AdminPortNumber = Annotated[
    int | None,
    typer.Option(
        "--alter-admin-port",
        help="Serve /admin on this port, and not on the one that generates. Environment: ALTER_ADMIN_PORT.",
    ),
]
AdminHost = Annotated[
    str | None,
    typer.Option(
        "--alter-admin-host",
        help=f"Address of the admin port, by default {DEFAULT_ADMIN_HOST}. Environment: ALTER_ADMIN_HOST.",
    ),
]
AdminCertfile = Annotated[
    Path | None,
    typer.Option(
        "--alter-admin-certfile",
        help="Certificate of the admin port (PEM): HTTPS. Environment: ALTER_ADMIN_CERTFILE.",
    ),
]
AdminKeyfile = Annotated[
    Path | None,
    typer.Option(
        "--alter-admin-keyfile",
        help="Its private key (PEM), if it is another file. Environment: ALTER_ADMIN_KEYFILE.",
    ),
]
AdminClientCa = Annotated[
    Path | None,
    typer.Option(
        "--alter-admin-client-ca",
        help="Only clients with a certificate of these authorities (PEM) may connect to the admin port; they "
        "need a token all the same. Environment: ALTER_ADMIN_CLIENT_CA.",
    ),
]


def client_tls(
    ca_file: Path | None, certfile: Path | None, keyfile: Path | None
) -> ssl.SSLContext | None:
    """What a client of HTTPS trusts and shows; None if nothing is given. Raises: ConfigError."""
    if ca_file is certfile is keyfile is None:
        return None
    try:
        context = ssl.create_default_context(cafile=ca_file)
        if certfile is not None:
            context.load_cert_chain(certfile, keyfile)
    except OSError as error:  # SSLError is one
        raise ConfigError(
            "The certificates cannot be used",
            expected="PEM files",
            got=getattr(error, "reason", None) or error.strerror or type(error).__name__,
            fix="Check ALTER_CA_FILE, ALTER_CLIENT_CERT and ALTER_CLIENT_KEY.",
        ) from error
    return context
