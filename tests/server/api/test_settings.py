"""Flag over environment over default, and nothing bad is swallowed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sqlalchemy import make_url

from alter_core.errors import ConfigError, DomainNameError
from server.settings import (
    ServeSettings,
    read_environment,
    resolve_admin_token,
    token_digest,
)


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("ALTER_")]:
        monkeypatch.delenv(name)


def test_defaults() -> None:
    settings = ServeSettings.build(substrate=Path("/s"))
    assert settings == ServeSettings(substrate=Path("/s"))
    assert (settings.max_domains, dict(settings.domains)) == (64, {})
    assert settings.admin_token_sha256 is None
    assert settings.tokens_file is None
    assert (
        settings.audit_log == Path(os.environ["XDG_STATE_HOME"]) / "alter-server" / "audit.sqlite"
    )


def test_the_audit_log_is_where_it_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        default = tmp_path / ".local" / "state" / "alter-server" / "audit.sqlite"
        assert ServeSettings.build(substrate=Path("/s")).audit_log == default
    monkeypatch.setenv("ALTER_AUDIT_LOG", "~/log")
    monkeypatch.setenv("ALTER_TOKENS_FILE", "~/tokens")
    settings = ServeSettings.build(substrate=Path("/s"))
    assert settings.audit_log == tmp_path / "log"
    assert settings.tokens_file == tmp_path / "tokens"
    monkeypatch.chdir(tmp_path)
    settings = ServeSettings.build(
        substrate=Path("/s"), audit_log=Path("flag"), tokens_file=Path("flag2")
    )
    assert settings.audit_log == tmp_path / "flag"
    assert settings.tokens_file == tmp_path / "flag2"


def test_registry_and_store_lie_beside_the_audit_log_unless_they_are_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    digest = "sha256:" + "0123456789abcdef" * 4
    settings = ServeSettings.build(substrate=Path("/s"), audit_log=tmp_path / "a" / "log")
    beside = tmp_path / "a"
    assert settings.registry_url(digest) == f"sqlite:///{beside}/registry-0123456789abcdef.sqlite"
    assert settings.store_url == str(beside / "bundles")
    assert settings.cache == beside / "bundle-cache"
    assert (settings.require_if_match, settings.lease_s) == (False, 10.0)
    monkeypatch.setenv("ALTER_REGISTRY", "postgresql://host/db")
    monkeypatch.setenv("ALTER_STORE", "s3://bucket/experts")
    monkeypatch.setenv("ALTER_REQUIRE_IF_MATCH", "1")
    monkeypatch.setenv("ALTER_LEASE_S", "4")
    settings = ServeSettings.build(substrate=Path("/s"))
    assert settings.registry_url(digest) == "postgresql://host/db"
    assert settings.store_url == "s3://bucket/experts"
    assert (settings.require_if_match, settings.lease_s) == (True, 4.0)
    monkeypatch.chdir(tmp_path)
    settings = ServeSettings.build(substrate=Path("/s"), registry="sqlite:////r", store="here")
    assert (settings.registry_url(digest), settings.store_url) == (
        "sqlite:////r",
        str(tmp_path / "here"),
    )


@pytest.mark.parametrize("lease_s", [0.0, -1.0, 0.5, float("nan")])
def test_a_lease_that_cannot_be_renewed_in_time_is_refused(lease_s: float) -> None:
    with pytest.raises(ConfigError, match="lease"):
        ServeSettings.build(substrate=Path("/s"), lease_s=lease_s)


def test_a_password_in_a_url_is_not_shown() -> None:
    settings = ServeSettings.build(substrate=Path("/s"), registry="postgresql://u:secret@h/d")
    assert "secret" not in repr(settings)


def test_the_registry_s_password_comes_from_a_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    secret = tmp_path / "password"
    secret.write_text("p@ss/word\n")
    settings = ServeSettings.build(
        substrate=Path("/s"), registry="postgresql://u@h/d", registry_password_file=secret
    )
    assert settings.registry == "postgresql+psycopg://u:p%40ss%2Fword@h/d"
    assert "word" not in repr(settings)
    monkeypatch.setenv("ALTER_REGISTRY", "postgresql://u@h/d?sslmode=verify-full")
    monkeypatch.setenv("ALTER_REGISTRY_PASSWORD_FILE", str(secret))
    found = make_url(str(ServeSettings.build(substrate=Path("/s")).registry))
    assert (found.password, found.query) == ("p@ss/word", {"sslmode": "verify-full"})


@pytest.mark.parametrize(
    ("url", "content", "complaint"),
    [
        (None, "p", "no registry"),
        ("sqlite:////r.sqlite", "p", "takes none"),
        ("postgresql://u:p@h/d", "q", "does not go with"),
        ("postgresql://h/d", "p", "does not go with"),
        ("postgresql://u@h/d", "\n", "is empty"),
        ("postgresql://u@h/d", None, "cannot be read"),
    ],
)
def test_a_password_file_that_cannot_be_used_stops_the_start(
    tmp_path: Path, url: str | None, content: str | None, complaint: str
) -> None:
    secret = tmp_path / "password"
    if content is not None:
        secret.write_text(content)
    with pytest.raises(ConfigError, match=complaint):
        ServeSettings.build(substrate=Path("/s"), registry=url, registry_password_file=secret)


def test_the_log_format_is_text_unless_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ServeSettings.build(substrate=Path("/s")).log_format == "text"
    monkeypatch.setenv("ALTER_LOG_FORMAT", "json")
    assert ServeSettings.build(substrate=Path("/s")).log_format == "json"
    assert ServeSettings.build(substrate=Path("/s"), log_format="text").log_format == "text"
    monkeypatch.setenv("ALTER_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match="ALTER_LOG_FORMAT"):
        ServeSettings.build(substrate=Path("/s"))


def test_a_user_without_a_home_has_to_say_where(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(ConfigError, match="--alter-audit-log"):
        ServeSettings.build(substrate=Path("/s"))
    assert ServeSettings.build(substrate=Path("/s"), audit_log=Path("/a")).audit_log == Path("/a")


def test_environment_fills_what_no_flag_gives(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALTER_SUBSTRATE", "/from/environment")
    monkeypatch.setenv("ALTER_MAX_DOMAINS", "7")
    monkeypatch.setenv("ALTER_DOMAINS", "a=/x, b=/y")
    monkeypatch.setenv("ALTER_ADMIN_TOKEN", "t1")
    settings = ServeSettings.build()
    assert settings.substrate == Path("/from/environment")
    assert settings.max_domains == 7
    assert dict(settings.domains) == {"a": Path("/x"), "b": Path("/y")}
    assert settings.admin_token_sha256 == token_digest("t1")

    token = tmp_path / "token"
    token.write_text("t2\n")
    settings = ServeSettings.build(
        substrate=Path("/flag"), domains=["c=/z"], max_domains=9, admin_token_file=token
    )
    assert settings.substrate == Path("/flag")
    assert (settings.max_domains, dict(settings.domains)) == (9, {"c": Path("/z")})
    assert settings.admin_token_sha256 == token_digest("t2")


def test_relative_folders_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ServeSettings.build(substrate=Path("s"), domains=["a=b"])
    assert settings.substrate == tmp_path / "s"
    assert settings.domains["a"] == tmp_path / "b"


@pytest.mark.parametrize("value", ["0", "many", "-1", "1.5"])
def test_a_bad_environment_value_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("ALTER_MAX_DOMAINS", value)
    with pytest.raises(ConfigError, match="ALTER_MAX_DOMAINS"):
        ServeSettings.build(substrate=Path("/s"), max_domains=3)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALTER_MAX_DOMAINS", "")
    assert ServeSettings.build(substrate=Path("/s")).max_domains == 64


def test_a_substrate_is_needed() -> None:
    with pytest.raises(ConfigError, match="--alter-substrate or ALTER_SUBSTRATE"):
        ServeSettings.build()


@pytest.mark.parametrize("text", ["a", "a=", ""])
def test_a_domain_is_given_as_name_and_folder(text: str) -> None:
    with pytest.raises(ConfigError, match="NAME=DIR"):
        ServeSettings.build(substrate=Path("/s"), domains=[text])


@pytest.mark.parametrize("name", ["A", "", "retain"])
def test_unusable_names_are_refused(name: str) -> None:
    with pytest.raises(DomainNameError):
        ServeSettings.build(substrate=Path("/s"), domains=[f"{name}=/x"])


def test_one_name_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="Two bundles"):
        ServeSettings.build(substrate=Path("/s"), domains=["a=/x", "a=/y"])


def test_more_domains_than_slots_are_refused() -> None:
    with pytest.raises(ConfigError, match="at most 1"):
        ServeSettings.build(substrate=Path("/s"), domains=["a=/x", "b=/y"], max_domains=1)
    with pytest.raises(ConfigError, match=">= 1"):
        ServeSettings.build(substrate=Path("/s"), max_domains=0)


def test_the_token_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALTER_ADMIN_TOKEN", "hunter2")
    settings = ServeSettings.build(substrate=Path("/s"))
    assert "hunter2" not in repr(settings)
    assert "sha256" not in repr(settings)
    assert "hunter2" not in repr(read_environment())


def test_two_tokens_are_a_contradiction(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("t")
    monkeypatch.setenv("ALTER_ADMIN_TOKEN", "t")
    monkeypatch.setenv("ALTER_ADMIN_TOKEN_FILE", str(tmp_path / "token"))
    with pytest.raises(ConfigError, match="Two admin tokens"):
        ServeSettings.build(substrate=Path("/s"))
    assert resolve_admin_token(tmp_path / "token", read_environment()) == "t"


@pytest.mark.parametrize("content", [b"", b" \n", b"a b", "ä".encode(), b"\xff", b"a\x00b"])
def test_unusable_tokens_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="admin token"):
        ServeSettings.build(substrate=Path("/s"), admin_token_file=path)


def test_a_missing_token_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        ServeSettings.build(substrate=Path("/s"), admin_token_file=tmp_path / "none")
