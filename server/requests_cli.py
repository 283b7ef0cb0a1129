"""`alter requests | evidence`. Results on stdout, everything else on stderr."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from alter_core.errors import ConfigError
from server.api.request_models import UnlearningRequest
from server.client import DEFAULT_URL
from server.evidence import read_certificate, read_envelope, render_certificate, verified
from server.requests.intake import parse_files, parse_retain
from server.requests.records import Approval

from .cli import AsJson, Reason, TokenFile, Url, admin_client, print_json, reported

requests_app = typer.Typer(
    no_args_is_help=True, help="Ask a running server to train an expert and to forget a domain."
)

evidence_app = typer.Typer(
    no_args_is_help=True, help="Get and verify the evidence of an unlearning request."
)

Id = Annotated[str, typer.Argument(help="Id of the request.")]


@requests_app.command("create")
def create_command(
    domain: Annotated[str, typer.Argument(help="Name of the forget domain.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            help="What is to be forgotten: rows if a file's name ends in .jsonl, else a text."
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--source", help="The same, in a file or at a URL that the server reads."),
    ] = None,
    retain: Annotated[
        list[Path] | None,
        typer.Option(
            "--retain",
            metavar="FILE.jsonl",
            help="Rows to be kept, in place of the server's own sample; may be repeated.",
        ),
    ] = None,
    approval: Annotated[
        Approval,
        typer.Option(
            "--approval",
            help="`automatic` activates what passes the quality gate; `manual` asks in any case.",
        ),
    ] = "automatic",
    deadline: Annotated[
        datetime | None,
        typer.Option("--deadline", help="By when it has to be active, in local time."),
    ] = None,
    reason: Reason = None,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Follow it until it has ended.")
    ] = True,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Upload what is to be forgotten; the server trains an expert, measures it and activates it."""
    rows, documents = parse_files(_contents(files or []))
    kept = parse_retain(_contents(retain or []))
    with admin_client(url, token_file) as client:
        request = client.create_request(
            domain,
            forget=rows,
            documents=documents,
            source=source,
            retain=kept,
            approval=approval,
            deadline=None if deadline is None else deadline.astimezone(UTC),
            reason=reason,
        )
        if wait:
            _follow(client.watch_request(request.id), as_json)
        else:
            _print(request, as_json)


@requests_app.command("list")
def list_command(
    url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: AsJson = False
) -> None:
    """List the requests of all servers, the newest first."""
    with admin_client(url, token_file) as client:
        answer = client.list_requests()
    if as_json:
        print_json(answer)
        return
    table = Table()
    for heading in ("id", "domain", "state", "question", "reason", "deadline", "error"):
        table.add_column(heading, overflow="fold")
    for each in answer.requests:
        late = " (overdue)" if each.is_overdue else ""
        due = "" if each.deadline is None else each.deadline.isoformat(timespec="minutes") + late
        table.add_row(
            each.id,
            each.domain,
            each.state,
            each.question or "",
            each.reason or "",
            due,
            each.error or "",
        )
    Console().print(table)


@requests_app.command("show")
def show_command(
    request_id: Id, url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: AsJson = False
) -> None:
    """Show one request."""
    with admin_client(url, token_file) as client:
        _print(client.show_request(request_id), as_json)


@requests_app.command("watch")
def watch_command(
    request_id: Id, url: Url = DEFAULT_URL, token_file: TokenFile = None, as_json: AsJson = False
) -> None:
    """Follow one request until it has ended."""
    with admin_client(url, token_file) as client:
        _follow(client.watch_request(request_id), as_json)


@requests_app.command("approve")
def approve_command(
    request_id: Id,
    reason: Reason = None,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """Let a request that awaits approval go on."""
    with admin_client(url, token_file) as client:
        _print(client.approve_request(request_id, reason=reason), as_json)


@requests_app.command("cancel")
def cancel_command(
    request_id: Id,
    reason: Reason = None,
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
    as_json: AsJson = False,
) -> None:
    """End a request that is not being activated yet, and delete its text."""
    with admin_client(url, token_file) as client:
        _print(client.cancel_request(request_id, reason=reason), as_json)


@evidence_app.command("get")
def evidence_get_command(
    request_id: Id,
    out: Annotated[
        Path,
        typer.Option(
            "--out", help="File: a page if its name ends in .html, else the envelope alone."
        ),
    ],
    url: Url = DEFAULT_URL,
    token_file: TokenFile = None,
) -> None:
    """Save the evidence of a request as it is now."""
    with admin_client(url, token_file) as client:
        envelope = client.evidence(request_id)
    page = out.suffix in (".html", ".htm")
    out.write_text(render_certificate(envelope) if page else json.dumps(envelope), "utf-8")


@evidence_app.command("verify")
def evidence_verify_command(
    file: Annotated[Path, typer.Argument(help="What `alter evidence get` saved.")],
    key: Annotated[
        list[Path],
        typer.Option("--key", metavar="PEM", help="Public key that is trusted; may be repeated."),
    ],
    as_json: AsJson = False,
) -> None:
    """Check who signed it and that a page shows nothing else; print what it says."""
    with reported():
        text = _bytes_of(file).decode("utf-8", "replace")
        is_page = text.lstrip().startswith("<")
        envelope = read_certificate(text) if is_page else read_envelope(text)
        document = verified(envelope, key)
    if as_json:
        typer.echo(json.dumps(document, indent=2))
        return
    request, activation = document["request"], document["activation"]
    typer.echo(f"signed, issued {document['issued_at']} by {document['issued_by']}")
    typer.echo(
        f"domain {request['domain']}, case {request['reason'] or '(none)'}: {request['state']}"
    )
    if activation is not None:
        applies = "applied then" if activation["applies_now"] else "not applied any more then"
        typer.echo(f"epoch {activation['epoch']}, expert {request['bundle_digest']}, {applies}")
    typer.echo(f"audit log: {document['audit']['head']}")


def _contents(files: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Raises: ConfigError."""
    return ((path.name, _bytes_of(path)) for path in files)


def _bytes_of(path: Path) -> bytes:
    """Raises: ConfigError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"The file {path} cannot be read",
            expected="a file",
            got=error.strerror or type(error).__name__,
            fix="Check the path.",
        ) from error


def _follow(seen: Any, as_json: bool) -> None:
    """Shows every change on stderr and the end on stdout; exits with 1 unless it is active."""
    console = Console(stderr=True)
    last: UnlearningRequest | None = None
    for last in seen:
        step = last.progress
        done = "" if step is None else f"  {step.stage} {step.done}/{step.total}"
        why = last.question or last.error or ""
        console.print(f"{last.state}{done}{'  ' + why if why else ''}", highlight=False)
        if last.state == "awaiting-approval":
            console.print(f"Decide with: alter requests approve {last.id}, or cancel")
    if last is not None:
        _print(last, as_json)
        if last.state != "active":
            raise typer.Exit(1)


def _print(request: UnlearningRequest, as_json: bool) -> None:
    if as_json:
        print_json(request)
        return
    console = Console()
    console.print(f"[bold]{request.domain}[/bold]  {request.state}  {request.id}")
    shown = request.model_dump(
        mode="json", exclude_none=True, exclude={"id", "domain", "state", "figures", "progress"}
    )
    for name, value in shown.items():
        console.print(f"  {name}: {value}", highlight=False)
    for name, check in request.figures.get("gate", {}).get("checks", {}).items():
        met = "met" if check["is_met"] else "[bold]missed[/bold]"
        console.print(f"  {name}: {check['value']:.3f}, threshold {check['threshold']}, {met}")
