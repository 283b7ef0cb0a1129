"""`alter bundle inspect | verify | sign`: what a bundle is, and whether it is what was signed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from alter_core.bundle import read_bundle, read_manifest
from server.signatures import SignaturePolicy, sign_bundle

bundle_app = typer.Typer(help="Inspect, verify and sign bundles.", no_args_is_help=True)

Folder = Annotated[Path, typer.Argument(help="Folder of a substrate or forget-expert bundle.")]


@bundle_app.command("inspect")
def inspect_command(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest itself.")] = False,
) -> None:
    """Show a bundle's manifest; its content is not verified."""
    manifest = read_manifest(folder)
    console = Console()
    if as_json:
        print(manifest.canonical_json().decode())
        return
    table = Table("what", "value", title=f"{manifest.kind} {manifest.name}")
    table.add_row("digest", manifest.digest)
    table.add_row("base model", f"{manifest.base_model.name} ({manifest.base_model.architecture})")
    table.add_row("fingerprint", manifest.base_model.fingerprint)
    table.add_row("substrate", manifest.substrate_digest or "(this is one)")
    table.add_row("sites", str(len(manifest.sites)))
    table.add_row("rank", str(manifest.config.rank))
    table.add_row("trained by", manifest.training.method)
    for name, data in manifest.training.data.items():
        table.add_row(f"data: {name}", f"{data.num_rows} rows, sha256 {data.sha256[:16]}")
    table.add_row("created at", manifest.created_at.isoformat())
    console.print(table)


@bundle_app.command("verify")
def verify_command(
    folder: Folder,
    public_key: Annotated[
        list[Path] | None,
        typer.Option(help="Also verify the signature: it must be of one of these keys (PEM)."),
    ] = None,
) -> None:
    """Verify every digest and tensor of a bundle and, with a key, its signature."""
    manifest = read_manifest(folder)
    policy = SignaturePolicy.build(None, public_key or ())
    policy.read(folder, lambda folder: read_bundle(folder, manifest.kind))
    print(f"{manifest.kind} {manifest.name} {manifest.digest}")


@bundle_app.command("sign")
def sign_command(
    folder: Folder,
    private_key: Annotated[Path, typer.Option(help="Private elliptic-curve key (PEM).")],
) -> None:
    """Verify a bundle, then sign it with a private key as an OpenSSF model signature."""
    manifest = read_manifest(folder)
    read_bundle(folder, manifest.kind)
    print(f"{sign_bundle(folder, private_key)}")
