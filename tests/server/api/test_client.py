"""The typed client and the command line, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

from alter_core.errors import (
    AlterError,
    BundleNotFoundError,
    ConfigError,
    DomainConflictError,
    DomainNameError,
    DomainNotFoundError,
    OperationNotFoundError,
    SwitchError,
    UnsupportedEngineError,
)
from server import cli, launch
from server import client as client_module
from server.audit import AuditEntry, AuditLog
from server.client import AdminClient
from server.settings import ServeSettings
from server.tokens import TokenStore
from tests.support.tiny import TinyBundles

from .conftest import TOKEN, Listening

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("ALTER_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")


def test_the_client_speaks_the_whole_api(listening: Listening, bundles: TinyBundles) -> None:
    folder = str(bundles.experts["domain-0"])
    with AdminClient(listening.url + "/", TOKEN) as client:
        done = client.activate("a", folder, in_flight="abort", is_new=True, idempotency_key="k")
        assert (done.outcome, done.state, done.epoch) == ("created", "active", 1)
        assert (
            client.activate("a", folder, is_new=True, in_flight="abort", idempotency_key="k")
            == done
        )
        assert client.show("a").digest == done.digest
        assert [d.name for d in client.list_domains().domains] == ["a"]
        assert client.status().slots.used == 1
        assert client.fleet().active_epoch == 1
        with pytest.raises(AlterError, match="If-Match does not hold"):
            client.revoke("a", if_epoch=0)
        revoked = client.revoke("a", if_epoch=1)
        assert (revoked.outcome, revoked.epoch) == ("revoked", 2)
        assert client.operation(done.id).epoch == 1


def test_the_client_waits_as_long_as_it_is_told_to(
    listening: Listening, bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_WAIT_S", 1)
    gate: asyncio.Event = listening.call(asyncio.Event)
    listening.stack.engine.gate = gate
    folder = str(bundles.experts["domain-0"])
    with AdminClient(listening.url, TOKEN, timeout_s=2) as client:
        early = client.activate("a", folder, is_awaited=False)
        assert early.state == "pending"
        with pytest.raises(SwitchError, match="does not hold everywhere"):
            client.revoke("a")
        listening.call(gate.set)
        assert client.operation(early.id, wait_s=20).state == "active"


def test_the_client_raises_the_servers_errors(listening: Listening, bundles: TinyBundles) -> None:
    folder = str(bundles.experts["domain-0"])
    with AdminClient(listening.url, TOKEN) as client:
        client.activate("a", folder)
        with pytest.raises(DomainConflictError) as caught:
            client.activate("b", folder)
        assert caught.value.expected
        assert caught.value.got
        assert caught.value.fix
        with pytest.raises(BundleNotFoundError):
            client.activate("b", folder + "-nothing")
        with pytest.raises(DomainNotFoundError):
            client.show("b")
        with pytest.raises(DomainNameError):
            client.show("a/../x")
        with pytest.raises(OperationNotFoundError):
            client.operation("nothing")
        listening.call(listening.stack.engine.break_down)
        with pytest.raises(SwitchError, match="recorded as epoch 2"):
            client.revoke("a")
    for token in (None, "wrong"):
        with AdminClient(listening.url, token) as client, pytest.raises(ConfigError, match="token"):
            client.list_domains()


def test_other_servers_and_none_at_all_are_told_apart() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200 if request.url.path.endswith("status") else 404, text="hello")

    with AdminClient("http://other", "t", transport=httpx.MockTransport(answer)) as client:
        for call in (client.status, client.list_domains):
            with pytest.raises(AlterError, match="not an admin side"):
                call()
    client = AdminClient("http://127.0.0.1:9", "t")
    with client, pytest.raises(AlterError, match="does not answer"):
        client.status()


def run(*arguments: str, exit_code: int = 0) -> tuple[str, str]:
    result = RUNNER.invoke(cli.domains_app, list(arguments))
    assert result.exit_code == exit_code, result.output
    return result.stdout, result.stderr


def fleet_app() -> typer.Typer:
    app = typer.Typer()
    app.command()(cli.fleet_command)
    return app


def test_domains_from_the_command_line(
    listening: Listening, bundles: TinyBundles, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ALTER_URL", listening.url)
    monkeypatch.setenv("ALTER_ADMIN_TOKEN", TOKEN)
    monkeypatch.chdir(bundles.experts["domain-0"].parent)
    assert "created" in run("activate", "a", "domain-0", "--in-flight", "abort")[0]
    assert listening.stack.engine.switches[-1]["in_flight"] == "abort"

    listed = json.loads(run("list", "--json")[0])
    assert (listed["epoch"], listed["domains"][0]["name"]) == (1, "a")
    assert "epoch 1, 1 active" in run("list")[0]
    assert listed["domains"][0]["digest"] in run("show", "a")[0]
    assert json.loads(run("show", "a", "--json")[0])["slot"] == 0

    out, err = run("revoke", "a", "--if-epoch", "7", exit_code=1)
    assert out == ""
    assert "expected: If-Match" in " ".join(err.split())
    assert "a: revoked, active; epoch 2, pause 30 ms" in run("revoke", "a")[0]
    assert json.loads(run("activate", "a", "domain-0", "--no-wait", "--json")[0])["epoch"] == 3
    fleet = RUNNER.invoke(fleet_app(), [])
    assert (fleet.exit_code, "(this one)" in fleet.stdout) == (0, True)
    run("revoke", "a")
    out, err = run("show", "a", exit_code=1)
    assert (out, err.splitlines()[0]) == ("", "error: No active domain is named 'a'")
    run("activate", "a", "s3://bucket/x", exit_code=1)
    run("activate", "a", exit_code=2)

    token_file = tmp_path / "token"
    token_file.write_text("wrong\n")
    _, err = run("list", "--token-file", str(token_file), exit_code=2)
    assert "token" in err


def test_no_token_is_told(listening: Listening, monkeypatch: pytest.MonkeyPatch) -> None:
    _, err = run("list", "--url", listening.url, exit_code=2)
    assert "ALTER_ADMIN_TOKEN" in err
    monkeypatch.setenv("ALTER_MAX_DOMAINS", "junk")
    _, err = run("list", "--url", listening.url, exit_code=2)
    assert "ALTER_MAX_DOMAINS" in err


@pytest.fixture
def app() -> typer.Typer:
    """Composed as the command line's main module does."""
    app = typer.Typer()
    app.command("serve", context_settings=cli.SERVE_CONTEXT)(cli.serve_command)
    app.add_typer(cli.domains_app, name="domains")
    return app


def test_serve_passes_every_other_flag_on(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[str, ServeSettings, list[str]]] = []
    monkeypatch.setattr(launch, "serve", lambda *arguments: calls.append(arguments))
    (tmp_path / "token").write_text("t")
    flags = [
        "--max-model-len", "512", "-tp", "2", "--alter-domain", "a=/x", "--enforce-eager",
        "--alter-domain", "b=/y", "--speculative-config.method=ngram", "-asc", "1",
        "--alter-max-domains", "9", "--alter-admin-token-file", str(tmp_path / "token"),
        "--additional-config", '{"x": 1}', "-O3", "--served-model-name", "m1", "m2",
        "--alter-audit-log", "/a/log", "--alter-tokens-file", "/t/tokens.json",
        "--alter-registry", "postgresql://h/d", "--alter-store", "/b", "--alter-require-if-match",
        "--alter-lease-s", "4",
    ]  # fmt: skip
    result = RUNNER.invoke(app, ["serve", "org/model", "--alter-substrate", "/s", *flags])
    assert result.exit_code == 0, result.output
    [(model, settings, vllm_args)] = calls
    assert model == "org/model"
    assert (settings.substrate, settings.max_domains) == (Path("/s"), 9)
    assert dict(settings.domains) == {"a": Path("/x"), "b": Path("/y")}
    assert settings.admin_token_sha256 is not None
    assert settings.audit_log == Path("/a/log")
    assert settings.tokens_file == Path("/t/tokens.json")
    assert (settings.registry, settings.store) == ("postgresql://h/d", "/b")
    assert (settings.require_if_match, settings.lease_s) == (True, 4)
    assert vllm_args == [
        "--max-model-len", "512", "-tp", "2", "--enforce-eager",
        "--speculative-config.method=ngram", "-asc", "1",
        "--additional-config", '{"x": 1}', "-O3", "--served-model-name", "m1", "m2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [
        (UnsupportedEngineError("no", expected="e", got="g", fix="f"), 2),
        (ConfigError("no", expected="e", got="g", fix="f"), 2),
        (BundleNotFoundError("no", expected="e", got="g", fix="f"), 1),
    ],
)
def test_serve_reports_refusals(
    app: typer.Typer, monkeypatch: pytest.MonkeyPatch, error: AlterError, exit_code: int
) -> None:
    def refuse(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(launch, "serve", refuse)
    result = RUNNER.invoke(app, ["serve", "m", "--alter-substrate", "/s"])
    assert result.exit_code == exit_code
    assert result.stdout == ""
    assert result.stderr.splitlines() == [
        "error: no",
        "  expected: e",
        "  got:      g",
        "  fix:      f",
    ]


def test_serve_without_a_substrate_is_a_usage_error(app: typer.Typer) -> None:
    result = RUNNER.invoke(app, ["serve", "m"])
    assert result.exit_code == 2
    assert "--alter-substrate" in result.stderr


def test_a_reason_goes_from_the_command_line_into_the_audit_log(
    make_stack: Callable[..., Any],
    bundles: TinyBundles,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    log = AuditLog.open(tmp_path / "audit.sqlite")
    with contextlib.closing(Listening(functools.partial(make_stack, audit_log=log))) as listening:
        monkeypatch.setenv("ALTER_URL", listening.url)
        monkeypatch.setenv("ALTER_ADMIN_TOKEN", TOKEN)
        folder, reason = str(bundles.experts["domain-0"]), "Az. 3 O 12/26 – 100 % §17"
        run("activate", "a", folder, "--reason", reason)
        run("revoke", "a", "--reason", reason)
        _, err = run("revoke", "a", "--reason", "a\nb", exit_code=2)
        assert "reason cannot be recorded" in err
    records = [r for r in log.records() if r.action != "start"]
    asked = [r.outcome for r in records if r.action != "apply"]
    assert asked == ["begun", "created", "begun", "revoked"]
    assert {r.reason for r in records} == {reason}


def operate(*arguments: str, exit_code: int = 0) -> tuple[str, str]:
    """`alter audit` and `alter token`."""
    app = typer.Typer()
    app.add_typer(cli.audit_app, name="audit")
    app.add_typer(cli.token_app, name="token")
    result = RUNNER.invoke(app, list(arguments))
    assert result.exit_code == exit_code, result.output
    return result.stdout, result.stderr


def test_audit_from_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "audit.sqlite"
    monkeypatch.setenv("ALTER_AUDIT_LOG", str(path))
    for command in ("verify", "export", "head"):
        _, err = operate("audit", command, exit_code=1)
        assert "No such file" in err
    assert not path.exists()

    log = AuditLog.open(path)
    for index in range(3):
        log.append(
            AuditEntry(
                actor="alice",
                request_id=f"r{index}",
                action="revoke",
                domain="a",
                epoch_before=index,
                epoch_after=index,
                digest=None,
                reason="§1",
                outcome="refused",
                error=None,
            )
        )
    head = operate("audit", "head")[0].strip()
    assert head == str(log.head())
    lines = operate("audit", "export")[0].splitlines()
    assert [json.loads(line)["request_id"] for line in lines] == ["r0", "r1", "r2"]
    assert operate("audit", "verify", "--head", head)[0].startswith("3 records, unbroken: sha256:")
    _, err = operate("audit", "verify", "--head", head.replace("3 ", "4 "), exit_code=1)
    assert "record 4 was cut off" in err
    operate("audit", "verify", "--head", "junk", exit_code=2)

    export = tmp_path / "export.jsonl"
    export.write_text("\n".join(lines) + "\n")
    assert operate("audit", "verify", "--export", str(export), "--head", head)[0].startswith("3 ")
    export.write_text("\n".join(lines).replace("r1", "r7") + "\n")
    out, err = operate("audit", "verify", "--export", str(export), exit_code=1)
    assert (out, err.splitlines()[0]) == (
        "",
        "error: The audit log is broken: record 2 was changed",
    )
    other = str(tmp_path / "other")
    operate("audit", "verify", "--alter-audit-log", other, exit_code=1)


def test_tokens_from_the_command_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    _, err = operate("token", "list", exit_code=2)
    assert "ALTER_TOKENS_FILE" in err
    monkeypatch.setenv("ALTER_TOKENS_FILE", str(path))
    operate("token", "list", exit_code=2)

    create = ("token", "create", "--name", "alice", "--role")
    token = operate(*create, "operator", "--days", "0.5")[0].strip()
    found = TokenStore(path).find(token)
    assert found is not None
    assert (found.name, found.role) == ("alice", "operator")
    operate(*create, "viewer", exit_code=2)
    operate(*create, "root", exit_code=2)
    assert TokenStore(path).find(operate(*create, "viewer", "--replace")[0].strip())
    assert TokenStore(path).find(token) is None

    for out in (operate("token", "list")[0], operate("token", "list", "--json")[0]):
        assert "viewer" in out
        assert json.loads(path.read_text())["tokens"][0]["sha256"] not in out
    assert operate("token", "revoke", "alice")[0] == "alice revoked\n"
    operate("token", "revoke", "alice", exit_code=2)
    assert json.loads(operate("token", "list", "--json")[0]) == []
