"""`/admin` on a port of its own, with TLS and client certificates of its own.

The listener lives in vLLM's process and event loop, beside vLLM's: one service, two doors. It is bound before
the engine is loaded, so that a taken port or a certificate that cannot be used stops the start early.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp

from alter_core.errors import ConfigError

logger = logging.getLogger(__name__)

DEFAULT_ADMIN_HOST = "127.0.0.1"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdminPort:
    """Where `/admin` listens. Raises: ConfigError for what cannot be used."""

    port: int
    host: str = DEFAULT_ADMIN_HOST
    certfile: Path | None = None
    """PEM of the server's certificate and those above it; without it, plain HTTP."""
    keyfile: Path | None = None
    """PEM of its private key; None: it is in `certfile`."""
    client_ca: Path | None = None
    """PEM of authorities: only clients with a certificate of one of them get in. They need a token too."""

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536:
            raise ConfigError(
                "The admin port is out of range",
                expected="1 to 65535",
                got=str(self.port),
                fix="Set --alter-admin-port.",
            )
        if self.certfile is None and (self.keyfile or self.client_ca):
            raise ConfigError(
                "The admin port has no certificate",
                expected="a certificate where a key or a client authority is given",
                got="none",
                fix="Set --alter-admin-certfile.",
            )
        if self.certfile is not None:
            _check_tls(self.certfile, self.keyfile, self.client_ca)

    def bind(self) -> socket.socket:
        """A socket there, which does not listen yet. Raises: ConfigError."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind, protocol)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            listener.close()
            raise self._unusable(error) from error
        return listener

    def _unusable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"The admin side cannot listen on {self.host}, port {self.port}",
            expected="an address of this machine, and a free port",
            got=error.strerror or type(error).__name__,
            fix="Set --alter-admin-host and --alter-admin-port.",
        )


class AdminServer:
    """Serves an application on an admin port, until it is closed."""

    def __init__(self, where: AdminPort, listener: socket.socket, app: ASGIApp) -> None:
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            ssl_certfile=where.certfile,
            ssl_keyfile=where.keyfile,
            ssl_ca_certs=None if where.client_ca is None else str(where.client_ca),
            ssl_cert_reqs=ssl.CERT_NONE if where.client_ca is None else ssl.CERT_REQUIRED,
        )
        self._server = _Server(config)
        listener.listen()  # whoever connects before the loop gets to it is served then
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]))
        scheme = "http" if where.certfile is None else "https"
        logger.info("The admin side listens on %s://%s:%d/admin", scheme, where.host, where.port)

    async def close(self) -> None:
        """Ends it; requests that run are answered."""
        self._server.should_exit = True
        await self._serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are for vLLM's server."""
        yield


def _check_tls(certfile: Path, keyfile: Path | None, client_ca: Path | None) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certfile, keyfile, password=_no_password)
        if client_ca is not None:
            context.load_verify_locations(client_ca)
    except OSError as error:  # SSLError is one
        raise ConfigError(
            "The certificates of the admin port cannot be used",
            expected="PEM files: a certificate, its key without a password, authorities for clients",
            got=getattr(error, "reason", None) or error.strerror or type(error).__name__,
            fix="Check --alter-admin-certfile, --alter-admin-keyfile and --alter-admin-client-ca.",
        ) from error


def _no_password() -> NoReturn:
    raise OSError("the key has a password")
