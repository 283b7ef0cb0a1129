"""Configuration of `alter serve`: flag over environment over default.

ALTER_SUBSTRATE          folder of the substrate
ALTER_DOMAINS            NAME=DIR,NAME=DIR: domains to forget from the start
ALTER_MAX_DOMAINS        slots for experts
ALTER_ADMIN_TOKEN        bearer token of /admin
ALTER_ADMIN_TOKEN_FILE   file that holds it
ALTER_TOKENS_FILE        file with the tokens that `alter token create` made
ALTER_AUDIT_LOG          file of the audit log
ALTER_REGISTRY           URL of the registry's database
ALTER_REGISTRY_PASSWORD_FILE   file that holds its password
ALTER_STORE              folder or URL of the bundle store
ALTER_REQUIRE_IF_MATCH   1: refuse changes that name no epoch
ALTER_BASE_ANSWERS       1: show what the base model would answer, beside what is answered now
ALTER_LEASE_S            seconds of generating without word of the registry
ALTER_LOG_FORMAT         text or json
ALTER_WORKSPACE, ALTER_RETAIN, ALTER_GENERAL, ALTER_TRAINING_DEVICE and the like: `server.requests.settings`
ALTER_SIGNATURES, ALTER_TRUSTED_KEYS, ALTER_BUNDLE_SOURCES, ALTER_ADMIN_PORT and the like: `server.security`
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import SettingsConfigDict

from alter_core.errors import ConfigError
from server.domain_rules import check_domain_name
from server.flag_values import absolute, split
from server.logs import LogFormat
from server.registry.database import with_password
from server.registry.registry import DEFAULT_LEASE_S
from server.requests.settings import RequestEnvironment, RequestFlags, RequestSettings
from server.security import Security, SecurityEnvironment, SecurityFlags

DEFAULT_MAX_DOMAINS = 64
ENV_PREFIX = "ALTER_"
MIN_LEASE_S = 1.0
_SHORT_DIGEST = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What `alter serve` was asked to do, beyond vLLM's own flags."""

    substrate: Path
    """Absolute folder of the substrate."""
    domains: Mapping[str, Path] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """Absolute bundle folder by name: recorded in the registry, unless it is active with that very bundle,
    and applied before the first request is answered."""
    max_domains: int = DEFAULT_MAX_DOMAINS
    """Slots for experts, >= 1. Memory for all of them is taken at start-up: see `server.memory`."""
    admin_token_sha256: bytes | None = dataclasses.field(default=None, repr=False)
    """Digest of the bearer token of /admin that has the role admin, never the token."""
    tokens_file: Path | None = None
    """Absolute file of tokens with roles. Without it and the one above, /admin is closed."""
    audit_log: Path = dataclasses.field(default_factory=lambda: default_audit_log())
    """Absolute file of the audit log; begun if there is none."""
    registry: str | None = dataclasses.field(default=None, repr=False)
    """URL of the registry's database; None: a SQLite file of this substrate beside the audit log."""
    store: str | None = dataclasses.field(default=None, repr=False)
    """URL or absolute folder of the bundle store; None: a folder beside the audit log."""
    require_if_match: bool = False
    """Refuse changes that name no epoch."""
    base_answers: bool = False
    """Let operators see what the base model would answer: see `server.base_answers`."""
    lease_s: float = DEFAULT_LEASE_S
    """For how long this server may generate without word of the registry, >= MIN_LEASE_S seconds. The fleet
    waits so long, and a margin, for one that is gone."""
    log_format: LogFormat = "text"
    """How this server and vLLM log: `json` is one object per line."""
    security: Security = dataclasses.field(default_factory=Security)
    """Signatures, sources of bundles, and the port of /admin."""
    requests: RequestSettings = dataclasses.field(default_factory=RequestSettings)
    """Of unlearning requests."""

    def __post_init__(self) -> None:
        if self.max_domains < 1:
            raise ConfigError(
                "max_domains is out of range",
                expected=">= 1",
                got=str(self.max_domains),
                fix="Set --alter-max-domains.",
            )
        if not self.lease_s >= MIN_LEASE_S:
            raise ConfigError(
                "The lease is too short to be renewed in time",
                expected=f">= {MIN_LEASE_S} s",
                got=f"{self.lease_s} s",
                fix="Set --alter-lease-s.",
            )
        if len(self.domains) > self.max_domains:
            raise ConfigError(
                "More domains are given than there are slots",
                expected=f"at most {self.max_domains}",
                got=str(len(self.domains)),
                fix="Raise --alter-max-domains or give fewer --alter-domain.",
            )

    def registry_url(self, substrate_digest: str) -> str:
        """Where the registry is, for a substrate."""
        if self.registry is not None:
            return self.registry
        name = substrate_digest.removeprefix("sha256:")[:_SHORT_DIGEST]
        return f"sqlite:///{self.audit_log.with_name(f'registry-{name}.sqlite')}"

    @property
    def store_url(self) -> str:
        """Where bundles are kept."""
        return self.store or str(self.audit_log.with_name("bundles"))

    @property
    def workspace(self) -> Path:
        """Where the text of unlearning requests lies."""
        return self.requests.workspace or self.audit_log.with_name("unlearning")

    @property
    def cache(self) -> Path:
        """Folder for bundles of a store that is not on this machine."""
        return self.audit_log.with_name("bundle-cache")

    @classmethod
    def build(
        cls,
        *,
        substrate: Path | None = None,
        domains: Iterable[str] = (),
        max_domains: int | None = None,
        admin_token_file: Path | None = None,
        tokens_file: Path | None = None,
        audit_log: Path | None = None,
        registry: str | None = None,
        registry_password_file: Path | None = None,
        store: str | None = None,
        require_if_match: bool = False,
        base_answers: bool = False,
        lease_s: float | None = None,
        log_format: LogFormat | None = None,
        security: SecurityFlags | None = None,
        requests: RequestFlags | None = None,
    ) -> ServeSettings:
        """Fills what no flag gives from the environment. `domains` are `NAME=DIR` texts.

        Raises: ConfigError, DomainNameError, TrainingDataError.
        """
        environment = read_environment()
        substrate = substrate or environment.substrate
        if substrate is None:
            raise ConfigError(
                "No substrate is given",
                expected="a substrate bundle folder",
                got="nothing",
                fix="Set --alter-substrate or ALTER_SUBSTRATE.",
            )
        token = resolve_admin_token(admin_token_file, environment)
        substrate = substrate.expanduser().absolute()
        return cls(
            substrate=substrate,
            domains=_parse_domains(tuple(domains) or split(environment.domains)),
            max_domains=max_domains if max_domains is not None else environment.max_domains,
            admin_token_sha256=None if token is None else token_digest(token),
            tokens_file=absolute(tokens_file or environment.tokens_file),
            audit_log=resolve_audit_log(audit_log, environment),
            registry=_with_password(
                registry or environment.registry,
                registry_password_file or environment.registry_password_file,
            ),
            store=_place(store or environment.store),
            require_if_match=require_if_match or environment.require_if_match,
            base_answers=base_answers or environment.base_answers,
            lease_s=lease_s if lease_s is not None else environment.lease_s,
            log_format=log_format or environment.log_format,
            security=Security.build(security or SecurityFlags(), environment, substrate),
            requests=RequestSettings.build(requests or RequestFlags(), environment),
        )


class Environment(SecurityEnvironment, RequestEnvironment):
    """The ALTER_* variables. `Environment()` raises pydantic's ValidationError for a bad value."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_ignore_empty=True, extra="ignore")

    substrate: Path | None = None
    domains: str = ""
    max_domains: int = Field(default=DEFAULT_MAX_DOMAINS, ge=1)
    admin_token: SecretStr | None = None
    """The token of /admin that has the role admin. Also what the command line sends."""
    admin_token_file: Path | None = None
    tokens_file: Path | None = None
    audit_log: Path | None = None
    registry: str | None = None
    registry_password_file: Path | None = None
    store: str | None = None
    require_if_match: bool = False
    base_answers: bool = False
    log_format: LogFormat = "text"
    lease_s: float = Field(default=DEFAULT_LEASE_S, ge=MIN_LEASE_S)


def read_environment() -> Environment:
    """Raises: ConfigError for a bad value; a wrong environment must not start a server."""
    try:
        return Environment()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ENV_PREFIX + str(first["loc"][0]).upper()
        raise ConfigError(
            f"The environment variable {name} has a bad value",
            expected=first["msg"],
            got="a secret" if "TOKEN" in name else repr(first["input"]),
            fix=f"Correct {name}, or unset it.",
        ) from error


def resolve_admin_token(token_file: Path | None, environment: Environment) -> str | None:
    """The admin token: of the file that a flag names, else of the environment, else none.

    Raises: ConfigError if the file cannot be read, or the token could not stand in a header.
    """
    if token_file is not None:
        return _read_token_file(token_file)
    if environment.admin_token is not None and environment.admin_token_file is not None:
        raise ConfigError(
            "Two admin tokens are given",
            expected="ALTER_ADMIN_TOKEN or ALTER_ADMIN_TOKEN_FILE",
            got="both",
            fix="Unset one of them.",
        )
    if environment.admin_token_file is not None:
        return _read_token_file(environment.admin_token_file)
    if environment.admin_token is not None:
        return _checked_token(environment.admin_token.get_secret_value(), "ALTER_ADMIN_TOKEN")
    return None


def default_audit_log() -> Path:
    """Below the user's folder for state, as the XDG base directory specification has it.

    Raises: ConfigError if there is no such folder.
    """
    try:
        given = os.environ.get("XDG_STATE_HOME", "")
        state = Path(given) if given.startswith("/") else Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise ConfigError(
            "There is no place for the audit log",
            expected="a user with a home folder",
            got=str(error),
            fix="Set --alter-audit-log or ALTER_AUDIT_LOG.",
        ) from error
    return state / "alter-server" / "audit.sqlite"


def resolve_audit_log(path: Path | None, environment: Environment) -> Path:
    """The audit log: of a flag, else of the environment, else the default. Raises: ConfigError."""
    return absolute(path or environment.audit_log) or default_audit_log()


def token_digest(token: str) -> bytes:
    """What is kept of a token."""
    return hashlib.sha256(token.encode()).digest()


def _read_token_file(path: Path) -> str:
    return _checked_token(_read_secret(path, "admin token"), str(path))


def _with_password(url: str | None, password_file: Path | None) -> str | None:
    """The registry's URL with the password of a file. Raises: ConfigError."""
    if password_file is None:
        return url
    if url is None:
        raise ConfigError(
            "A password of the registry is given, but no registry",
            expected="the URL of a PostgreSQL database",
            got="none",
            fix="Set --alter-registry or ALTER_REGISTRY, or unset ALTER_REGISTRY_PASSWORD_FILE.",
        )
    password = _read_secret(password_file, "registry password").strip("\r\n")
    if not password:
        raise ConfigError(
            f"The registry password file {password_file} is empty",
            expected="a password",
            got="nothing",
            fix="Write it into the file, or unset ALTER_REGISTRY_PASSWORD_FILE.",
        )
    return with_password(url, password)


def _read_secret(path: Path, what: str) -> str:
    try:
        return path.expanduser().read_text("utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"The {what} file {path} cannot be read",
            expected=f"a text file that holds the {what}",
            got=getattr(error, "strerror", None) or type(error).__name__,
            fix="Check the path that was given, and the file's permissions.",
        ) from error


def _checked_token(text: str, source: str) -> str:
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"The admin token in {source} cannot be used",
            expected="one or more visible ASCII characters",
            got="an empty text" if not token else "a text with other characters",
            fix="Make one with: openssl rand -hex 32",
        )
    return token


def _place(text: str | None) -> str | None:
    """A URL as it is, a folder made absolute."""
    if text is None or "://" in text:
        return text
    return str(absolute(Path(text)))


def _parse_domains(texts: Iterable[str]) -> Mapping[str, Path]:
    domains: dict[str, Path] = {}
    for text in texts:
        name, separator, folder = text.partition("=")
        if not separator or not folder:
            raise ConfigError(
                "A forget domain is not given as NAME=DIR",
                expected="NAME=DIR",
                got=repr(text),
                fix="For example: --alter-domain authors=/bundles/authors",
            )
        check_domain_name(name)
        if name in domains:
            raise ConfigError(
                f"Two bundles are given for the forget domain {name!r}",
                expected="each name once",
                got=f"{domains[name]} and {folder}",
                fix="Remove one --alter-domain, or choose another name for it.",
            )
        domains[name] = Path(folder).expanduser().absolute()
    return MappingProxyType(domains)
