"""`alter eval interference`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from alter_core.errors import ConfigError
from alter_core.rows import check_disjoint, data_digest, read_rows
from alter_core.substrate import ForgetExpert, Substrate
from trainer.base_model import load_base_model
from trainer.cli import named_paths
from trainer.dataset import encode_rows
from trainer.inputs import part_of
from trainer.progress import RichReporter
from trainer.substrate import on_device

from .interference import Harm, measure_interference, nearest_rows
from .interference_report import sentence, write_interference

_RETAIN = "retain"


def interference_command(
    model: Annotated[Path, typer.Argument(help="Base model folder.")],
    substrate: Annotated[Path, typer.Option(help="Substrate of the experts.")],
    domain: Annotated[
        list[str], typer.Option(metavar="NAME=DIR", help="An expert; twice or more.")
    ],
    rows: Annotated[
        list[str], typer.Option(metavar="NAME=FILE.jsonl", help="The rows of each domain.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for figures, page and heat map.")],
    retain: Annotated[
        list[Path] | None, typer.Option(help="Rows that are kept; repeatable.")
    ] = None,
    neighbours: Annotated[
        int, typer.Option(min=1, help="Retained rows read for each domain: those most like it.")
    ] = 40,
    threshold: Annotated[
        float, typer.Option(min=0, help="Conflicts are named from here on, nats per answer token.")
    ] = 0.05,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """What each expert does to the other domains and to retained text near them.

    A pass over the text for each expert; it is not resumed, and what --out held of it is replaced.
    """
    folders, files = named_paths("--domain", domain), named_paths("--rows", rows)
    _check_domains(folders, files)
    texts = {part_of(name): read_rows([files[name]]) for name in folders}
    if retain:
        texts[_RETAIN] = read_rows(retain)
    check_disjoint(texts)
    base = load_base_model(model, device=device)
    shared = on_device(Substrate.read(substrate, base.info), base.device)
    experts = {name: ForgetExpert.read(folder, shared) for name, folder in folders.items()}
    encoded = {
        part: encode_rows(members, base.tokenizer, max_tokens=base.max_tokens)
        for part, members in texts.items()
    }
    own, near = {name: encoded[part_of(name)] for name in folders}, None
    if retain:
        tap_layer = shared.config.tap_layer
        near = nearest_rows(base, own, encoded[_RETAIN], tap_layer=tap_layer, count=neighbours)
    found = measure_interference(base, shared, experts, own, near, RichReporter())
    what = {
        "model": base.info.fingerprint,
        "substrate": shared.digest,
        "experts": {name: expert.digest for name, expert in experts.items()},
        "data": {part: data_digest(members).model_dump() for part, members in texts.items()},
        "neighbours": neighbours if retain else None,
    }
    page = write_interference(out, found, threshold, what)
    _show("rows of", found.names, found.on_rows)
    if found.on_neighbours is not None:
        _show("neighbours of", found.names, found.on_neighbours)
    for conflict in found.conflicts(threshold):
        typer.echo(sentence(conflict))
    typer.echo(f"page: {page}")


def _show(text: str, names: Sequence[str], harm: Harm) -> None:
    table = Table("loss, change in nats", *(f"{text} {name}" for name in names))
    for name, changes in zip(names, harm.loss_change, strict=True):
        table.add_row(name, *(f"{change:.4f}" for change in changes))
    Console().print(table)


def _check_domains(folders: Mapping[str, Path], files: Mapping[str, Path]) -> None:
    """Raises: ConfigError unless there are two experts or more, and rows of each and no other."""
    if len(folders) < 2:
        raise ConfigError(
            "Interference takes two domains",
            expected="--domain NAME=DIR, twice or more",
            got=", ".join(folders),
            fix="Name every expert that is to be active.",
        )
    lacking = [f"{name} without rows" for name in folders if name not in files]
    unknown = [f"rows of {name}, which is no domain here" for name in files if name not in folders]
    if lacking or unknown:
        raise ConfigError(
            "Experts and rows do not belong together",
            expected="--domain NAME=DIR and --rows NAME=FILE.jsonl for the same names",
            got="; ".join(lacking + unknown),
        )
