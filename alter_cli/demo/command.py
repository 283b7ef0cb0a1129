"""`alter demo`: from nothing to a running server that forgets, keeps the rest, and remembers again."""

from __future__ import annotations

import json
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from alter_eval.data import default_data_dir

from . import artefacts
from .server_process import serve


class Dataset(StrEnum):
    """Whom the demo is about."""

    AUTHORS = "authors"
    TOFU = "tofu"


def demo_command(
    dataset: Annotated[
        Dataset, typer.Option(help="`authors` are generated; `tofu` is read from ALTER_DATA_DIR.")
    ] = Dataset.AUTHORS,
    authors: Annotated[int | None, typer.Option(help="Authors that the base model knows.")] = None,
    domains: Annotated[int, typer.Option(min=1, help="Forget domains.")] = 2,
    out: Annotated[Path, typer.Option(help="Where artefacts and the summary are kept.")] = Path(
        "build/demo"
    ),
    retain_rows: Annotated[int, typer.Option(min=2, help="Retained rows to ask, at most.")] = 60,
    seed: Annotated[int, typer.Option(help="Seed of data and training.")] = 0,
) -> None:
    """Train a small model and two forget experts, serve them on vLLM, and watch it forget."""
    console = Console()
    started = time.monotonic()
    out = out.resolve()
    corpus = artefacts.load_corpus(
        dataset.value,
        num_authors=authors,
        num_domains=domains,
        data_dir=default_data_dir(),
        seed=seed,
    )
    made = artefacts.make(corpus, out, seed=seed, console=console)
    _write_paths(out / "paths.env", made)
    console.print("[dim]$ alter serve MODEL --alter-substrate SUBSTRATE[/]")
    launched = time.monotonic()
    with serve(
        made.model,
        made.substrate,
        out / "server.log",
        ("--max-model-len", "1024", "--dtype", made.dtype),
    ) as server:
        with console.status("starting vLLM with ALTER"):
            # Imported while the server starts: the client's libraries take seconds to load.
            from .story import Story, StorySettings

            server.wait_until_ready()
        ready_s = time.monotonic() - launched
        summary = Story(server, made, StorySettings(num_retain=retain_rows), console).tell()
    summary["timings_s"] = {
        **{name: round(seconds, 1) for name, seconds in made.timings_s.items()},
        "server_start": round(ready_s, 1),
        **summary["timings_s"],
        "total": round(time.monotonic() - started, 1),
    }
    summary["seed"] = seed
    path = out / "summary.json"
    path.write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    _show_summary(console, summary)
    console.print(f"summary: {path}")


def _write_paths(path: Path, made: artefacts.Artefacts) -> None:
    """Shell variables with the folders and the dtype, to serve by hand what the demo made."""
    values = {
        "MODEL": made.model,
        "SUBSTRATE": made.substrate,
        "EXPERTS": made.substrate.parent,
        "DTYPE": made.dtype,
    }
    path.write_text("".join(f"ALTER_DEMO_{name}={value}\n" for name, value in values.items()))


def _show_summary(console: Console, summary: dict[str, Any]) -> None:
    table = Table(
        "rows", "probability", "ROUGE-L", "state", title="What was measured", title_justify="left"
    )
    for name, states in summary["domains"].items():
        for state in ("before", "active", "revoked"):
            figures = states[state]
            table.add_row(name, f"{figures['probability']:.3f}", f"{figures['rouge_l']:.3f}", state)
    for state in ("before", "active"):
        figures = summary["retain"][state]
        table.add_row(
            "(retained)", f"{figures['probability']:.3f}", f"{figures['rouge_l']:.3f}", state
        )
    console.print(table)
    console.print(
        f"retained answers that did not change: {summary['retain']['identical_completions']:.1%}; "
        f"answers of {summary['one_revoked']['domain']} that came back while the others stayed forgotten: "
        f"{summary['one_revoked']['identical_completions']:.1%}"
    )
    if switch := summary["switch"]:
        console.print(
            f"switch inside a stream: active after {switch['activate_ms']:.0f} ms, longest gap "
            f"{switch['max_stream_gap_ms']:.0f} ms, {switch['tokens_equal_to_fresh_run']:.0f} of "
            f"{switch['tokens_after']:.0f} later tokens equal a fresh run"
        )
