"""`alter serve | domains | fleet | trace | audit | token`. Results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from alter_core.errors import AlterError, ConfigError, UnsupportedEngineError
from server import request_options
from server import security_options as options
from server.api.models import ForgetDomain, Operation
from server.audit import AuditLog, Head, read_export, verify_chain
from server.client import DEFAULT_URL, AdminClient
from server.engine.base import InFlight, Message
from server.logs import LogFormat
from server.registry.registry import DEFAULT_LEASE_S
from server.requests.settings import RequestFlags
from server.security import SecurityFlags
from server.settings import (
    DEFAULT_MAX_DOMAINS,
    ServeSettings,
    read_environment,
    resolve_admin_token,
    resolve_audit_log,
)
from server.tokens import Role, TokenStore

EXIT_FAILED = 1
EXIT_USAGE = 2

SERVE_CONTEXT = {"allow_extra_args": True, "ignore_unknown_options": True}
"""Context settings that `serve_command` needs: what it does not know goes to vLLM."""

domains_app = typer.Typer(
    no_args_is_help=True, help="List, activate and revoke forget domains of a running server."
)

audit_app = typer.Typer(no_args_is_help=True, help="Verify and export a server's audit log.")
token_app = typer.Typer(
    no_args_is_help=True,
    help="Make, list and revoke bearer tokens of /admin. A running server sees it at once.",
)

Url = Annotated[str, typer.Option("--url", envvar="ALTER_URL", help="Where the server listens.")]
TokenFile = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        help="File with the admin token. Default: ALTER_ADMIN_TOKEN or ALTER_ADMIN_TOKEN_FILE.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's answer as JSON.")]
NoWait = Annotated[
    bool,
    typer.Option(
        "--no-wait", help="Return once the change is recorded, before it holds on every server."
    ),
]
Name = Annotated[str, typer.Argument(help="Name of the forget domain.")]
Reason = Annotated[
    str | None,
    typer.Option(
        "--reason",
        help="Case number for the audit log. Never text that is to be forgotten: the log keeps it for ever.",
    ),
]
AuditLogPath = Annotated[
    Path | None,
    typer.Option(
        "--alter-audit-log",
        help="File of the audit log. Environment: ALTER_AUDIT_LOG. Default: "
        "alter-server/audit.sqlite in the user's state folder, ~/.local/state or XDG_STATE_HOME.",
    ),
]
TokensPath = Annotated[
    Path | None,
    typer.Option(
        "--alter-tokens-file",
        help="File of tokens with roles, as `alter token create` makes it. Environment: ALTER_TOKENS_FILE.",
    ),
]
TokenNameArgument = Annotated[str, typer.Argument(help="Name of the token.")]


def serve_command(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder or hub name of the base model.")],
    substrate: Annotated[
        Path | None,
        typer.Option("--alter-substrate", help="Substrate folder. Environment: ALTER_SUBSTRATE."),
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option(
            "--alter-domain",
            metavar="NAME=DIR",
            help="A domain to forget from the start: recorded in the registry unless it is active with this "
            "bundle; may be repeated. Environment: ALTER_DOMAINS.",
        ),
    ] = None,
    max_domains: Annotated[
        int | None,
        typer.Option(
            "--alter-max-domains",
            help=f"Slots, by default {DEFAULT_MAX_DOMAINS}. Each takes, occupied or not, rank x adapted "
            "output features x bytes of the dtype on every device: 15 MB for Qwen3-0.6B at rank 32, 61 MB "
            "for Llama-3-8B. More than fit are refused. Environment: ALTER_MAX_DOMAINS.",
        ),
    ] = None,
    admin_token_file: Annotated[
        Path | None,
        typer.Option(
            "--alter-admin-token-file",
            help="File with the token of /admin that has the role admin. Without it and a tokens file, "
            "/admin is closed. Environment: ALTER_ADMIN_TOKEN, ALTER_ADMIN_TOKEN_FILE.",
        ),
    ] = None,
    tokens_file: TokensPath = None,
    audit_log: AuditLogPath = None,
    registry: Annotated[
        str | None,
        typer.Option(
            "--alter-registry",
            metavar="URL",
            help="Database that says what is to be active: postgresql://USER@HOST/DB for several servers, "
            "sqlite:////PATH for those of one machine. Environment: ALTER_REGISTRY. Default: SQLite beside "
            "the audit log, one per substrate.",
        ),
    ] = None,
    registry_password_file: Annotated[
        Path | None,
        typer.Option(
            "--alter-registry-password-file",
            help="File with the password of the PostgreSQL user whom the registry's URL names. "
            "Environment: ALTER_REGISTRY_PASSWORD_FILE.",
        ),
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            "--alter-store",
            metavar="URL",
            help="Where bundles are kept, for all servers of the registry: a folder, or a URL such as "
            "s3://BUCKET/PREFIX. Environment: ALTER_STORE. Default: `bundles` beside the audit log.",
        ),
    ] = None,
    require_if_match: Annotated[
        bool,
        typer.Option(
            "--alter-require-if-match",
            help="Refuse changes that name no epoch (428): for several operators. Environment: "
            "ALTER_REQUIRE_IF_MATCH.",
        ),
    ] = False,
    base_answers: Annotated[
        bool,
        typer.Option(
            "--alter-base-answers",
            help="Let operators see what the base model would answer, forgotten or not, beside what is "
            "answered now. A second copy of the model computes it on the CPU, each time; it is audited. "
            "Environment: ALTER_BASE_ANSWERS.",
        ),
    ] = False,
    lease_s: Annotated[
        float | None,
        typer.Option(
            "--alter-lease-s",
            help=f"Seconds, by default {DEFAULT_LEASE_S:.0f}, that this server may generate without word of "
            "the registry; so long a change waits for a server that is gone. Environment: ALTER_LEASE_S.",
        ),
    ] = None,
    log_format: Annotated[
        LogFormat | None,
        typer.Option(
            "--alter-log-format",
            help="json: every record of ALTER and of vLLM is one JSON object per line, with request id and "
            "epoch where they are known. Default text, as vLLM has it. Environment: ALTER_LOG_FORMAT.",
        ),
    ] = None,
    signatures: options.Signatures = None,
    trusted_keys: options.TrustedKeys = None,
    bundle_sources: options.BundleSources = None,
    admin_port: options.AdminPortNumber = None,
    admin_host: options.AdminHost = None,
    admin_certfile: options.AdminCertfile = None,
    admin_keyfile: options.AdminKeyfile = None,
    admin_client_ca: options.AdminClientCa = None,
    workspace: request_options.WorkspacePath = None,
    retain: request_options.Retain = None,
    general: request_options.General = None,
    training_device: request_options.TrainingDevice = None,
    signing_key: request_options.SigningKey = None,
    max_upload_mib: request_options.MaxUpload = None,
    gate_max_forget_ratio: request_options.MaxForgetRatio = None,
    gate_min_utility_ratio: request_options.MinUtilityRatio = None,
    gate_max_paraphrase_leak: request_options.MaxParaphraseLeak = None,
) -> None:
    """Serve MODEL with forget domains; every flag of `vllm serve` may follow."""
    with reported():
        settings = ServeSettings.build(
            substrate=substrate,
            domains=domain or (),
            max_domains=max_domains,
            admin_token_file=admin_token_file,
            tokens_file=tokens_file,
            audit_log=audit_log,
            registry=registry,
            registry_password_file=registry_password_file,
            store=store,
            require_if_match=require_if_match,
            base_answers=base_answers,
            lease_s=lease_s,
            log_format=log_format,
            security=SecurityFlags(
                signatures=signatures,
                trusted_keys=tuple(trusted_keys or ()),
                bundle_sources=tuple(bundle_sources or ()),
                admin_port=admin_port,
                admin_host=admin_host,
                admin_certfile=admin_certfile,
                admin_keyfile=admin_keyfile,
                admin_client_ca=admin_client_ca,
            ),
            requests=RequestFlags(
                workspace=workspace,
                retain=tuple(retain or ()),
                general=tuple(general or ()),
                training_device=training_device,
                signing_key=signing_key,
                max_upload_mib=max_upload_mib,
                gate_max_forget_ratio=gate_max_forget_ratio,
                gate_min_utility_ratio=gate_min_utility_ratio,
                gate_max_paraphrase_leak=gate_max_paraphrase_leak,
            ),
        )
        from server.launch import serve

        serve(model, settings, context.args)


@domains_app.command("list")
def list_command(
    url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: AsJson = False
) -> None:
    """List what is active."""
    with admin_client(url, token_file) as client:
        answer = client.list_domains()
    if as_json:
        print_json(answer)
        return
    table = Table(title=f"epoch {answer.epoch}, {len(answer.domains)} active")
    for heading in ("name", "slot", "epoch", "since", "digest"):
        table.add_column(heading, overflow="fold")
    for domain in answer.domains:
        since = domain.since.isoformat(timespec="seconds")
        table.add_row(domain.name, str(domain.slot), str(domain.epoch), since, domain.digest[:19])
    Console().print(table)


@domains_app.command("activate")
def activate_command(
    name: Name,
    bundle: Annotated[
        str, typer.Argument(help="Bundle folder on the server's machine, or file:// URI.")
    ],
    in_flight: Annotated[
        InFlight,
        typer.Option(
            "--in-flight", help="Recompute running requests under the new experts, or abort."
        ),
    ] = "recompute",
    if_epoch: Annotated[
        int | None, typer.Option("--if-epoch", help="Only if nothing has changed since this epoch.")
    ] = None,
    reason: Reason = None,
    no_wait: NoWait = False,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Forget a domain, or replace its expert."""
    location = bundle if ":" in bundle else str(Path(bundle).expanduser().absolute())
    with admin_client(url, token_file) as client:
        answer = client.activate(
            name,
            location,
            in_flight=in_flight,
            if_epoch=if_epoch,
            reason=reason,
            is_awaited=not no_wait,
        )
    _print_operation(answer, as_json)


@domains_app.command("revoke")
def revoke_command(
    name: Name,
    if_epoch: Annotated[
        int | None, typer.Option("--if-epoch", help="Only if nothing has changed since this epoch.")
    ] = None,
    reason: Reason = None,
    no_wait: NoWait = False,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """End a domain; the base model's answers come back."""
    with admin_client(url, token_file) as client:
        answer = client.revoke(name, if_epoch=if_epoch, reason=reason, is_awaited=not no_wait)
    _print_operation(answer, as_json)


@domains_app.command("show")
def show_command(
    name: Name, url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: AsJson = False
) -> None:
    """Show one active domain."""
    with admin_client(url, token_file) as client:
        answer = client.show(name)
    if as_json:
        print_json(answer)
    else:
        _print_domain(answer)


def fleet_command(
    url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: AsJson = False
) -> None:
    """Show all servers of the registry: who applies what, who lags and why."""
    with admin_client(url, token_file) as client:
        answer = client.fleet()
    if as_json:
        print_json(answer)
        return
    table = Table(title=f"epoch {answer.head}, active up to {answer.active_epoch}")
    for heading in ("replica", "state", "epoch", "lag", "lease", "silent", "reason"):
        table.add_column(heading, overflow="fold")
    for replica in answer.replicas:
        table.add_row(
            replica.replica_id + (" (this one)" if replica.is_self else ""),
            replica.state,
            str(replica.applied_epoch),
            str(replica.lag),
            f"{replica.lease_left_s:.1f} s",
            f"{replica.silence_s:.1f} s",
            replica.reason or "",
        )
    Console().print(table)


def trace_command(
    text: Annotated[str, typer.Argument(help="What to trace; '-' reads it from standard input.")],
    as_chat: Annotated[
        bool, typer.Option("--chat", help="As a user's message, in the model's chat template.")
    ] = False,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Show how a running server routes a text: entropy, path and experts of every token."""
    if text == "-":
        text = typer.get_text_stream("stdin").read()
    with admin_client(url, token_file) as client:
        answer = client.trace([Message(role="user", content=text)] if as_chat else text)
    if as_json:
        print_json(answer)
        return
    table = Table(title=f"epoch {answer.epoch}")
    for heading in ("token", "entropy", "path", "experts"):
        table.add_column(heading)
    for token in answer.tokens:
        experts = ", ".join(f"{each.expert} {each.weight:.2f}" for each in token.experts)
        table.add_row(repr(token.text)[1:-1], f"{token.entropy:.3f}", token.path, experts)
    Console().print(table)


@audit_app.command("verify")
def audit_verify_command(
    head: Annotated[
        str | None,
        typer.Option(
            "--head", help="What `alter audit head` once printed: it must still be there."
        ),
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", help="Verify an export in place of the log.")
    ] = None,
    audit_log: AuditLogPath = None,
) -> None:
    """Check the chain of all records; name the first that was changed, removed or put in."""
    with reported():
        anchor = None if head is None else Head.parse(head)
        if export is not None:
            found = verify_chain(read_export(export), anchor)
        else:
            found = _open_audit_log(audit_log).verify(anchor)
    typer.echo(f"{found.sequence} records, unbroken: {found.hash}")


@audit_app.command("export")
def audit_export_command(audit_log: AuditLogPath = None) -> None:
    """Print all records as JSON Lines."""
    with reported():
        for record in _open_audit_log(audit_log).records():
            typer.echo(record.json())


@audit_app.command("head")
def audit_head_command(audit_log: AuditLogPath = None) -> None:
    """Print sequence and hash of the last record, to be kept where the server cannot write."""
    with reported():
        typer.echo(str(_open_audit_log(audit_log).head()))


def _open_audit_log(path: Path | None) -> AuditLog:
    return AuditLog.open_to_read(resolve_audit_log(path, read_environment()))


@token_app.command("create")
def token_create_command(
    role: Annotated[
        Role,
        typer.Option("--role", help="viewer reads; operator also changes domains; admin does all."),
    ],
    name: Annotated[
        str, typer.Option("--name", help="Who will use it: the actor in the audit log.")
    ],
    days: Annotated[
        float | None,
        typer.Option("--days", min=0, help="Days until it expires; without it, never."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="End the token that has this name.")
    ] = False,
    tokens_file: TokensPath = None,
) -> None:
    """Make a token and print it, once: only its digest is kept."""
    with reported():
        tokens = _tokens(tokens_file)
        lifetime = None if days is None else timedelta(days=days)
        typer.echo(tokens.create(name, role, lifetime=lifetime, replaces=replace))


@token_app.command("list")
def token_list_command(
    tokens_file: TokensPath = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False,
) -> None:
    """List names, roles and expiry."""
    with reported():
        tokens = _tokens(tokens_file).load()
    if as_json:
        rows = [token.model_dump(mode="json", exclude={"sha256"}) for token in tokens]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table()
    for heading in ("name", "role", "created", "expires"):
        table.add_column(heading, overflow="fold")
    now = datetime.now(UTC)
    for token in tokens:
        expires = "never"
        if token.expires_at is not None:
            word = "expired " if token.is_expired(now) else ""
            expires = word + token.expires_at.isoformat(timespec="seconds")
        created = token.created_at.isoformat(timespec="seconds")
        table.add_row(token.name, token.role, created, expires)
    Console().print(table)


@token_app.command("revoke")
def token_revoke_command(name: TokenNameArgument, tokens_file: TokensPath = None) -> None:
    """End a token."""
    with reported():
        _tokens(tokens_file).revoke(name)
    typer.echo(f"{name} revoked")


def _tokens(path: Path | None) -> TokenStore:
    path = path or read_environment().tokens_file
    if path is None:
        raise ConfigError(
            "No tokens file is given",
            expected="the file that the server reads",
            got="nothing",
            fix="Set --alter-tokens-file or ALTER_TOKENS_FILE.",
        )
    return TokenStore(path.expanduser().absolute())


@contextlib.contextmanager
def admin_client(url: str, token_file: Path | None) -> Iterator[AdminClient]:
    """A client with the token and the certificates of the environment; its errors end the command."""
    with reported():
        environment = read_environment()
        token = resolve_admin_token(token_file, environment)
        tls = options.client_tls(
            environment.ca_file, environment.client_cert, environment.client_key
        )
        with AdminClient(url, token, tls=tls) as client:
            yield client


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turns an error of ALTER into a message on stderr and an exit code."""
    try:
        yield
    except AlterError as error:
        raise typer.Exit(report(error)) from error


def report(error: AlterError) -> int:
    """Prints an error on stderr; returns the exit code that belongs to it."""
    typer.secho(f"error: {error.what}", err=True, fg="red")
    for label in ("expected", "got", "fix"):
        if (text := getattr(error, label)) is not None:
            typer.echo(f"  {label + ':':<10}{text}", err=True)
    is_usage = isinstance(error, ConfigError | UnsupportedEngineError)
    return EXIT_USAGE if is_usage else EXIT_FAILED


def print_json(answer: BaseModel) -> None:
    """On stdout."""
    typer.echo(answer.model_dump_json(indent=2))


def _print_operation(operation: Operation, as_json: bool) -> None:
    if as_json:
        print_json(operation)
        return
    text = f"{operation.name}: {operation.outcome}, {operation.state}; epoch {operation.epoch}"
    if (switch := operation.switch) is not None:
        text += (
            f", pause {switch.pause_s * 1000:.0f} ms, {switch.recomputed_requests} requests recomputed "
            f"({switch.recomputed_tokens} tokens), {switch.kept_requests} kept"
        )
    typer.echo(text)
    if operation.state != "active":
        typer.echo(f"operation {operation.id}; see `alter fleet`", err=True)


def _print_domain(domain: ForgetDomain) -> None:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows: dict[str, object] = {
        "name": domain.name,
        "digest": domain.digest,
        "slot": domain.slot,
        "epoch": domain.epoch,
        "since": domain.since.isoformat(timespec="seconds"),
        "tokens": f"{domain.routed_tokens.high} high, {domain.routed_tokens.low} low",
    }
    for label, value in rows.items():
        table.add_row(label, str(value))
    Console().print(table)
