"""Bearer tokens of `/admin` with roles, in a file that may change while the server runs.

The file holds the SHA-256 of each token and never the token. That is enough for tokens of 256 random
bits, which nobody can guess; it would not be for passwords.
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from alter_core.errors import ConfigError
from server.settings import token_digest

logger = logging.getLogger(__name__)

Role = Literal["viewer", "operator", "admin"]
"""viewer reads; operator also activates and revokes; admin may do everything."""

ROLES: tuple[Role, ...] = ("viewer", "operator", "admin")
"""Each may do what those before it may."""

TOKEN_PREFIX = "alter_"
"""By which scanners for secrets can recognise one."""
TOKEN_BYTES = 32
RESERVED_NAMES = frozenset(("admin", "server"))
"""Actors of the single admin token, and of what the server does by itself."""

TokenName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,62}$")]


class Token(BaseModel):
    """What is kept of one token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: TokenName
    """The actor in the audit log."""
    role: Role
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    """None: never."""

    def is_expired(self, now: datetime) -> bool:
        """True from `expires_at` on."""
        return self.expires_at is not None and now >= self.expires_at


class _Content(BaseModel):
    """The tokens file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    tokens: tuple[Token, ...] = Field(default=())


class Principal(BaseModel):
    """Who a request comes from."""

    model_config = ConfigDict(frozen=True)

    name: str
    role: Role

    def has(self, role: Role) -> bool:
        """True if it may do what `role` may."""
        return ROLES.index(self.role) >= ROLES.index(role)


class TokenStore:
    """The tokens in one file. It is read again whenever it has changed."""

    def __init__(
        self, path: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._path = path
        self._now = now
        self._version: tuple[int, ...] | None = None
        self._tokens: tuple[Token, ...] = ()

    def load(self) -> tuple[Token, ...]:
        """All tokens, the expired too.

        Raises: ConfigError if the file is missing or malformed, or others than its owner may write it.
        """
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                data = file.read()
        except OSError as error:
            raise self._unusable(
                "a file made by `alter token create`", error.strerror or "nothing"
            ) from error
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise self._unusable(
                "a file that its owner alone may write", oct(stat.S_IMODE(status.st_mode))
            )
        try:
            tokens = _Content.model_validate_json(data).tokens
        except ValidationError as error:
            place = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the whole"
            raise self._unusable("JSON as `alter token create` writes it", place) from error
        if len({token.name for token in tokens}) != len(tokens):
            raise self._unusable("each name once", "a name twice")
        self._version, self._tokens = _version(status), tokens
        return tokens

    def find(self, presented: str) -> Principal | None:
        """Who presented a token; None if it is unknown or expired, or the file cannot be used.

        Compares with every token in constant time, so that nothing tells how many were close.
        """
        self._refresh()
        digest, now = token_digest(presented).hex(), self._now()
        found: Token | None = None
        for token in self._tokens:
            if hmac.compare_digest(token.sha256, digest):
                found = token
        if found is None or found.is_expired(now):
            return None
        return Principal(name=found.name, role=found.role)

    def create(
        self, name: str, role: Role, *, lifetime: timedelta | None = None, replaces: bool = False
    ) -> str:
        """Makes a token, keeps its digest, and returns it: nobody can read it again.

        Raises: ConfigError if the name is reserved, or taken and not replaced.
        """
        token, now = TOKEN_PREFIX + secrets.token_urlsafe(TOKEN_BYTES), self._now()
        try:
            made = Token(
                name=name,
                role=role,
                sha256=token_digest(token).hex(),
                created_at=now,
                expires_at=None if lifetime is None else now + lifetime,
            )
        except (ValidationError, OverflowError) as error:
            raise ConfigError(
                "This token cannot be made",
                expected="a name of 1 to 63 letters, digits and . _ @ - and a lifetime in years at most",
                got=repr(name[:80]),
                fix="Name the person or the service that will use the token.",
            ) from error
        if name in RESERVED_NAMES:
            raise ConfigError(
                f"The name {name!r} belongs to the server",
                expected=f"a name other than {', '.join(sorted(RESERVED_NAMES))}",
                got=repr(name),
                fix="Name the person or the service that will use the token.",
            )
        with self._exclusively() as tokens:
            others = [t for t in tokens if t.name != name]
            if len(others) < len(tokens) and not replaces:
                raise ConfigError(
                    f"There is a token named {name!r} already",
                    expected="a new name",
                    got=repr(name),
                    fix="Use --replace to end the old one, or `alter token revoke` first.",
                )
            self._write((*others, made))
        return token

    def revoke(self, name: str) -> None:
        """Ends a token. Raises: ConfigError if there is none of that name."""
        with self._exclusively() as tokens:
            others = tuple(token for token in tokens if token.name != name)
            if len(others) == len(tokens):
                raise ConfigError(
                    "No token has that name",
                    expected="a name that `alter token list` shows",
                    got=repr(name[:80]),
                    fix="List the tokens with `alter token list`.",
                )
            self._write(others)

    def _refresh(self) -> None:
        try:
            version = _version(self._path.stat())
        except OSError:
            version = None
        if version is not None and version == self._version:
            return
        try:
            self.load()
        except ConfigError as error:
            # None of its tokens holds until it can be read again. Told once for each change.
            if self._tokens or version != self._version:
                logger.error("%s", error)
            self._version, self._tokens = version, ()

    @contextlib.contextmanager
    def _exclusively(self) -> Iterator[tuple[Token, ...]]:
        """The tokens as they are, while no other process changes them."""
        folder = self._path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                yield self.load() if self._path.exists() else ()
            finally:
                os.close(lock)
        except OSError as error:
            raise self._unusable(
                "a file that can be written", error.strerror or type(error).__name__
            ) from error

    def _write(self, tokens: tuple[Token, ...]) -> None:
        """All or nothing, for its owner alone, and durable: a revoked token stays revoked."""
        with tempfile.NamedTemporaryFile(
            dir=self._path.parent, prefix=f".{self._path.name}.", delete=False
        ) as file:
            try:
                file.write(_Content(tokens=tokens).model_dump_json(indent=2).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, self._path)
            except BaseException:
                os.unlink(file.name)
                raise
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _unusable(self, expected: str, got: str) -> ConfigError:
        return ConfigError(
            f"The tokens file {self._path} cannot be used",
            expected=expected,
            got=got,
            fix="Check --alter-tokens-file or ALTER_TOKENS_FILE and the file's permissions; "
            "`alter token create` makes one.",
        )


def _version(status: os.stat_result) -> tuple[int, ...]:
    """Differs between two contents of the file."""
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
