"""The tokens file: what it keeps, who it lets in, and that a change of it holds at once."""

from __future__ import annotations

import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from alter_core.errors import ConfigError
from server.settings import token_digest
from server.tokens import Principal, TokenStore

START = datetime(2026, 3, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.time = START

    def __call__(self) -> datetime:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "secrets" / "tokens.json"


@pytest.fixture
def store(path: Path, clock: Clock) -> TokenStore:
    return TokenStore(path, now=clock)


def test_a_token_is_found_by_what_it_is_and_not_kept(path: Path, store: TokenStore) -> None:
    alice = store.create("alice", "operator")
    bob = store.create("bob@example.org", "viewer")
    assert store.find(alice) == Principal(name="alice", role="operator")
    assert store.find(bob) == Principal(name="bob@example.org", role="viewer")
    for other in ("", "alice", alice[:-1], alice + "x", token_digest(alice).hex()):
        assert store.find(other) is None
    text = path.read_text()
    assert alice not in text
    assert token_digest(alice).hex() in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert os.listdir(path.parent) == ["tokens.json"]


def test_tokens_are_long_and_never_the_same(store: TokenStore) -> None:
    tokens = {store.create(f"t{i}", "admin") for i in range(5)}
    assert len(tokens) == 5
    assert all(t.startswith("alter_") and len(t) >= len("alter_") + 43 for t in tokens)


def test_a_running_server_sees_changes(path: Path, store: TokenStore) -> None:
    elsewhere = TokenStore(path)
    old = elsewhere.create("alice", "operator")
    assert store.find(old) is not None
    new = elsewhere.create("alice", "viewer", replaces=True)
    assert store.find(old) is None
    assert store.find(new) == Principal(name="alice", role="viewer")
    elsewhere.revoke("alice")
    assert store.find(new) is None


def test_an_unchanged_file_is_not_read_again(
    path: Path, store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = store.create("alice", "operator")
    assert store.find(token) is not None
    monkeypatch.setattr(store, "load", lambda: pytest.fail("read again"))
    assert store.find(token) is not None


def test_a_token_expires(store: TokenStore, clock: Clock) -> None:
    token = store.create("alice", "operator", lifetime=timedelta(days=2))
    clock.time = START + timedelta(days=2, microseconds=-1)
    assert store.find(token) is not None
    clock.time = START + timedelta(days=2)
    assert store.find(token) is None
    assert [t.name for t in store.load()] == ["alice"]


def test_names_are_unique_and_some_are_the_servers(store: TokenStore) -> None:
    store.create("alice", "operator")
    for name in ("alice", "admin", "server", "", "a b", "a\n", "-a", "x" * 64, "ä"):
        with pytest.raises(ConfigError):
            store.create(name, "viewer")
    with pytest.raises(ConfigError):
        store.create("bob", "viewer", lifetime=timedelta(days=999_999_999))
    with pytest.raises(ConfigError, match="No token"):
        store.revoke("bob")
    assert [t.name for t in store.load()] == ["alice"]


def test_tokens_made_at_the_same_time_are_all_kept(path: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda i: TokenStore(path).create(f"t{i}", "viewer"), range(24)))
    assert {t.name for t in TokenStore(path).load()} == {f"t{i}" for i in range(24)}


def broken(text: str) -> list[str]:
    """What may stand in the file in place of `text`."""
    content = json.loads(text)
    entry = content["tokens"][0]
    return [
        "",
        "{",
        "[]",
        json.dumps(content | {"format": 2}),
        json.dumps(content | {"more": 1}),
        json.dumps(content | {"tokens": [entry, entry]}),
        *(
            json.dumps(content | {"tokens": [entry | change]})
            for change in (
                {"role": "root"},
                {"sha256": entry["sha256"][1:]},
                {"sha256": "é" * 64},
                {"name": "a\nb"},
                {"expires_at": "2026-03-01T00:00:00"},
                {"token": "x"},
            )
        ),
    ]


def test_a_file_that_cannot_be_used_lets_nobody_in_until_it_can(
    path: Path, store: TokenStore
) -> None:
    token = store.create("alice", "admin")
    right = path.read_text()
    for text in broken(right):
        path.write_text(text)
        assert store.find(token) is None, text
        with pytest.raises(ConfigError, match="cannot be used"):
            TokenStore(path).load()
        path.write_text(right + " ")
        assert store.find(token) is not None
    path.unlink()
    assert store.find(token) is None
    with pytest.raises(ConfigError, match="No such file"):
        store.load()


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_that_others_may_write_is_refused(path: Path, store: TokenStore, mode: int) -> None:
    token = store.create("alice", "admin")
    assert store.find(token) is not None
    path.chmod(mode)
    assert store.find(token) is None
    with pytest.raises(ConfigError, match="its owner alone"):
        store.load()


def test_a_broken_file_is_not_written_over(path: Path, store: TokenStore) -> None:
    store.create("alice", "admin")
    path.write_text("{")
    with pytest.raises(ConfigError):
        store.create("bob", "viewer")
    assert path.read_text() == "{"


def test_a_token_is_never_in_the_log(
    path: Path, store: TokenStore, caplog: pytest.LogCaptureFixture
) -> None:
    token = store.create("alice", "admin")
    path.write_text(json.dumps({"format": 1, "tokens": [{"name": "alice", "token": token}]}))
    assert store.find(token) is None
    assert "cannot be used" in caplog.text
    assert token not in caplog.text


@pytest.mark.parametrize(
    ("role", "allowed"),
    [("viewer", 1), ("operator", 2), ("admin", 3)],
)
def test_each_role_may_do_what_those_below_it_may(role: str, allowed: int) -> None:
    principal = Principal.model_validate({"name": "a", "role": role})
    assert [principal.has(r) for r in ("viewer", "operator", "admin")] == [
        i < allowed for i in range(3)
    ]
