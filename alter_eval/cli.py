"""`alter eval`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from alter_core.attach import AttachedModel
from alter_core.errors import ConfigError
from alter_core.substrate import ForgetExpert, Substrate
from trainer.base_model import BaseModel, load_base_model
from trainer.checkpoint import write_atomically
from trainer.cli import named_paths
from trainer.dataset import EncodedRow, encode_rows, read_rows
from trainer.evaluation import attached_experts
from trainer.progress import RichReporter
from trainer.substrate import on_device

from . import tofu
from .data import default_data_dir
from .interference_cli import interference_command
from .models import LanguageModel, ServedModel, TransformersModel, WithoutExperts
from .report import write_report
from .run import FIGURES_FILE, evaluate, read_logs, tofu_rows
from .traces import Trace, trace

_TRACED_ROWS = 12

eval_app = typer.Typer(
    no_args_is_help=True, help="Measure what a model, or a server, has forgotten and kept."
)


class Split(StrEnum):
    """TOFU's forget sets: 1, 5 and 10 % of the authors."""

    FORGET01 = "01"
    FORGET05 = "05"
    FORGET10 = "10"


@eval_app.callback()
def _root() -> None:
    """One subcommand a benchmark."""


eval_app.command("interference")(interference_command)


@eval_app.command("tofu")
def tofu_command(
    model: Annotated[
        Path, typer.Argument(help="Folder of the base model, or of any other to measure.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for logs, figures and the page; may be gone on with.")
    ],
    split: Annotated[Split, typer.Option(help="Forget set.")] = Split.FORGET10,
    substrate: Annotated[Path | None, typer.Option(help="Substrate of the experts.")] = None,
    domain: Annotated[
        list[str] | None, typer.Option(metavar="NAME=DIR", help="An expert to attach; repeatable.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Ask this running server instead; MODEL gives the tokenizer.")
    ] = None,
    served_model: Annotated[str, typer.Option(help="The model's name on that server.")] = "demo",
    retrained: Annotated[
        Path | None,
        typer.Option(help="--out of the retrained model's evaluation, for what compares with it."),
    ] = None,
    holdout: Annotated[
        list[Path] | None,
        typer.Option(help="Rows that no model here was trained on, for the membership test."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder that holds tofu/. [default: ALTER_DATA_DIR]")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """TOFU: forget quality, model utility, extraction, membership, leaks, fluency."""
    _check_sources(substrate, domain or [], server)
    rows = tofu_rows(data or default_data_dir(), split.value)
    reference = read_logs(retrained) if retrained else None
    base = load_base_model(model, device=device)
    what: dict[str, Any] = {"model": base.info.fingerprint, "split": split.value, "experts": {}}
    traces: dict[str, Trace] = {}
    with _evaluated(base, substrate, domain or [], server, served_model, what) as (
        language_model,
        attached,
    ):
        logs = evaluate(
            language_model,
            rows,
            out,
            what=what,
            holdout=_holdout(base, holdout or []),
            judge=WithoutExperts(base, attached),
            reporter=RichReporter(),
        )
        if attached is not None and attached.experts:
            traces = {
                name: trace(attached, tofu.encode(base.tokenizer, members)[:_TRACED_ROWS])
                for name, members in rows.items()
            }
    figures = tofu.figures(logs, reference)
    write_atomically(out / FIGURES_FILE, json.dumps(figures, indent=1).encode() + b"\n")
    page = write_report(out, f"TOFU forget{split.value}", figures, logs, reference, traces)
    _show(figures)
    typer.echo(f"page: {page}")


def _check_sources(substrate: Path | None, domains: list[str], server: str | None) -> None:
    """Raises: ConfigError if the options contradict each other."""
    if server is not None and (substrate is not None or domains):
        raise ConfigError(
            "A server has its own experts",
            expected="neither --substrate nor --domain beside --server",
            got="one of them",
            fix="Activate the domains on the server.",
        )
    if domains and substrate is None:
        raise ConfigError(
            "Experts need their substrate",
            expected="--substrate",
            got="--domain alone",
            fix="Name the substrate that they were trained on.",
        )


def _holdout(base: BaseModel, files: list[Path]) -> list[EncodedRow]:
    if not files:
        return []
    return encode_rows(read_rows(files), base.tokenizer, max_tokens=base.max_tokens)


@contextlib.contextmanager
def _evaluated(
    base: BaseModel,
    substrate: Path | None,
    domains: list[str],
    server: str | None,
    served_model: str,
    what: dict[str, Any],
) -> Iterator[tuple[LanguageModel, AttachedModel | None]]:
    """What is asked, and the attached model if it is in this process; completes `what`."""
    if server is not None:
        what["server"] = served_model
        with contextlib.closing(ServedModel(server, served_model, base.tokenizer)) as served:
            yield served, None
        return
    if substrate is None:
        yield TransformersModel(base), None
        return
    shared = on_device(Substrate.read(substrate, base.info), base.device)
    folders = named_paths("--domain", domains)
    experts = [ForgetExpert.read(folder, shared) for folder in folders.values()]
    what["substrate"] = shared.digest
    what["experts"] = {name: e.digest for name, e in zip(folders, experts, strict=True)}
    with attached_experts(base, shared, experts) as attached:
        yield TransformersModel(base), attached


def _show(figures: Mapping[str, Any]) -> None:
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, "-" if value is None else f"{value:.4f}")
    Console().print(table)
