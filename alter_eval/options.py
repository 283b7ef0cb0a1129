"""Options that the commands of `alter eval` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path, typer.Argument(help="Folder of the base model, or of any other to measure.")
]
Out = Annotated[
    Path, typer.Option(help="Folder for logs, figures and the page; may be gone on with.")
]
SubstrateDir = Annotated[Path | None, typer.Option(help="Substrate of the experts.")]
Domain = Annotated[
    list[str] | None, typer.Option(metavar="NAME=DIR", help="An expert to attach; repeatable.")
]
Server = Annotated[
    str | None,
    typer.Option(
        help="Ask this running server instead; MODEL gives the tokenizer. Its API key, if it wants one, "
        "is read from ALTER_API_KEY."
    ),
]
ServedModelName = Annotated[str, typer.Option(help="The model's name on that server.")]
Data = Annotated[
    Path | None, typer.Option(help="Folder that holds the benchmarks. [default: ALTER_DATA_DIR]")
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
# A standard error takes two rows.
Limit = Annotated[
    int | None, typer.Option(min=2, help="Only the first so many rows of every set or subject.")
]
Subjects = Annotated[
    str, typer.Option(metavar="NAME,NAME", help="Only these subjects. [default: all]")
]
Retrained = Annotated[
    Path | None,
    typer.Option(help="--out of the retrained model's evaluation, for what compares with it."),
]
