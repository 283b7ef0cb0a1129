"""`alter eval`: one command a benchmark."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel as Schema
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from alter_core.errors import JudgeError
from alter_core.rows import read_rows
from trainer.base_model import BaseModel
from trainer.dataset import EncodedRow, encode_rows
from trainer.progress import RichReporter, SilentReporter

from . import fluency, muse, options, rwku, tofu
from .data import default_data_dir
from .interference_cli import interference_command
from .judge import PROMPT, Judge
from .logs import digest, read_log, run_parts, write_figures
from .models import WithoutExperts
from .multiple_choice import Subject, read_mmlu, read_wmdp
from .prompts import read_instructions
from .report import write_page, write_report
from .run import evaluate, read_logs, tofu_rows
from .source import Source
from .traces import Trace, trace

_TRACED_ROWS = 12


class _Benchmarks(TyperGroup):
    """Names the known benchmarks where one is unknown."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> tuple[Any, Any, list[str]]:
        if args[0] not in self.commands:
            ctx.fail(f"There is no benchmark {args[0]!r}; known: {', '.join(self.commands)}.")
        return super().resolve_command(ctx, args)


eval_app = typer.Typer(
    cls=_Benchmarks,
    no_args_is_help=True,
    help="Measure what a model, or a server, has forgotten and kept.",
)


class Split(StrEnum):
    """TOFU's forget sets: 1, 5 and 10 % of the authors."""

    FORGET01 = "01"
    FORGET05 = "05"
    FORGET10 = "10"


class Corpus(StrEnum):
    """MUSE's corpora."""

    NEWS = "news"
    BOOKS = "books"


@eval_app.callback()
def _root() -> None:
    """One subcommand a benchmark."""


@eval_app.command("tofu")
def tofu_command(
    model: options.Model,
    out: options.Out,
    split: Annotated[Split, typer.Option(help="Forget set.")] = Split.FORGET10,
    substrate: options.SubstrateDir = None,
    domain: options.Domain = None,
    server: options.Server = None,
    served_model: options.ServedModelName = "demo",
    retrained: options.Retrained = None,
    holdout: Annotated[
        list[Path] | None,
        typer.Option(help="Rows that no model here was trained on, for the membership test."),
    ] = None,
    data: options.Data = None,
    device: options.Device = "auto",
) -> None:
    """TOFU: forget quality, model utility, extraction, membership, leaks, fluency."""
    source = _source(model, device, substrate, domain, server, served_model)
    rows = tofu_rows(data or default_data_dir(), split.value)
    reference = read_logs(retrained) if retrained else None
    traces: dict[str, Trace] = {}
    with source.open() as opened:
        base, attached = opened.base, opened.attached
        logs = evaluate(
            opened.model,
            rows,
            out,
            what={**opened.what, "split": split.value},
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
    write_figures(out, figures)
    page = write_report(out, f"TOFU forget{split.value}", figures, logs, reference, traces)
    _show(figures, {})
    typer.echo(f"page: {page}")


@eval_app.command("mmlu")
def mmlu_command(
    model: options.Model,
    out: options.Out,
    subjects: options.Subjects = "",
    num_fewshot: Annotated[
        int, typer.Option(min=0, max=5, help="Solved questions shown first; MMLU's paper: 5.")
    ] = 0,
    limit: options.Limit = None,
    substrate: options.SubstrateDir = None,
    domain: options.Domain = None,
    server: options.Server = None,
    served_model: options.ServedModelName = "demo",
    data: options.Data = None,
    device: options.Device = "auto",
) -> None:
    """MMLU: multiple choice in 57 subjects, by lm-eval. Needs the extra `eval`."""
    source = _source(model, device, substrate, domain, server, served_model)
    found = read_mmlu((data or default_data_dir()) / "mmlu", _names(subjects))
    _multiple_choice("mmlu", source, out, found, num_fewshot, limit)


@eval_app.command("wmdp")
def wmdp_command(
    model: options.Model,
    out: options.Out,
    subjects: options.Subjects = "",
    limit: options.Limit = None,
    substrate: options.SubstrateDir = None,
    domain: options.Domain = None,
    server: options.Server = None,
    served_model: options.ServedModelName = "demo",
    data: options.Data = None,
    device: options.Device = "auto",
) -> None:
    """WMDP: hazardous knowledge (bio, chem, cyber) as multiple choice, by lm-eval. Needs the extra `eval`."""
    source = _source(model, device, substrate, domain, server, served_model)
    found = read_wmdp((data or default_data_dir()) / "wmdp", _names(subjects))
    _multiple_choice("wmdp", source, out, found, 0, limit)


def _multiple_choice(
    benchmark: str,
    source: Source,
    out: Path,
    subjects: Mapping[str, Subject],
    num_fewshot: int,
    limit: int | None,
) -> None:
    from . import harness  # the extra `eval`, and seconds to import

    with source.open() as opened:
        lm = harness.harness_model(opened)
        parts: dict[str, Callable[[], Schema]] = {
            name: partial(
                harness.evaluate_subject,
                lm,
                f"{benchmark}_{name}",
                subject,
                num_fewshot=num_fewshot,
                limit=limit,
            )
            for name, subject in subjects.items()
        }
        key = {
            **opened.what,
            "benchmark": benchmark,
            "lm_eval": harness.VERSION,
            "sets": {name: harness.subject_digest(subject) for name, subject in subjects.items()},
            "num_fewshot": num_fewshot,
            "limit": limit,
        }
        # lm-eval has bars of its own.
        run_parts(out, key, parts, SilentReporter())
    logs = {name: read_log(out / f"{name}.json", harness.SubjectLog) for name in subjects}
    figures = harness.accuracy_figures(benchmark, logs)
    _finish(out, f"{benchmark.upper()}, {num_fewshot}-shot", figures)


@eval_app.command("rwku")
def rwku_command(
    model: options.Model,
    out: options.Out,
    target: Annotated[
        list[str] | None,
        typer.Option(help="Only what is about this person; repeatable. [default: all]"),
    ] = None,
    limit: options.Limit = None,
    substrate: options.SubstrateDir = None,
    domain: options.Domain = None,
    server: options.Server = None,
    served_model: options.ServedModelName = "demo",
    data: options.Data = None,
    device: options.Device = "auto",
) -> None:
    """RWKU: real people by fill-in-the-blank, questions and attacks, their neighbours, and fluency."""
    source = _source(model, device, substrate, domain, server, served_model)
    folder = (data or default_data_dir()) / "rwku"
    sets = rwku.read_sets(folder, target or (), limit)
    has_fluency = (folder / rwku.FLUENCY_FILE).exists()
    instructions = read_instructions(folder / rwku.FLUENCY_FILE, limit) if has_fluency else []
    with source.open() as opened:
        parts: dict[str, Callable[[], Schema]] = {
            name: partial(rwku.evaluate_set, opened.model, rows) for name, rows in sets.items()
        }
        if has_fluency:
            parts["fluency"] = partial(rwku.evaluate_fluency, opened.model, instructions)
        key = {
            **opened.what,
            "benchmark": "rwku",
            "sets": {name: rwku.set_digest(rows) for name, rows in sets.items()},
            "fluency": digest(instructions),
        }
        run_parts(out, key, parts, RichReporter())
    logs = {name: read_log(out / f"{name}.json", rwku.SetLog) for name in sets}
    fluent = read_log(out / "fluency.json", rwku.FluencyLog) if has_fluency else None
    missing = {"ngram_entropy": f"not told: {rwku.FLUENCY_FILE} is not in the data folder"}
    _finish(out, "RWKU", rwku.figures(logs, fluent), missing)


@eval_app.command("muse")
def muse_command(
    model: options.Model,
    out: options.Out,
    corpus: Annotated[Corpus, typer.Option(help="Which texts.")] = Corpus.NEWS,
    prefix_tokens: Annotated[
        int, typer.Option(min=1, help="Where a text is cut: what follows is to be completed.")
    ] = muse.PREFIX_TOKENS,
    limit: options.Limit = None,
    substrate: options.SubstrateDir = None,
    domain: options.Domain = None,
    server: options.Server = None,
    served_model: options.ServedModelName = "demo",
    retrained: options.Retrained = None,
    data: options.Data = None,
    device: options.Device = "auto",
) -> None:
    """MUSE: verbatim and knowledge memorisation, privacy leakage, similarity gap. Needs the extra `eval`."""
    source = _source(model, device, substrate, domain, server, served_model)
    found = muse.read_corpus((data or default_data_dir()) / "muse" / corpus.value, limit)
    reference = muse.read_logs(retrained) if retrained else None
    with source.open() as opened:
        parts = muse.parts_of(
            opened.model, found, prefix_tokens=prefix_tokens, max_tokens=opened.base.max_tokens - 1
        )
        key = {
            **opened.what,
            "benchmark": "muse",
            "corpus": corpus.value,
            "rows": found.digest,
            "prefix_tokens": prefix_tokens,
        }
        run_parts(out, key, parts, RichReporter())
    figures = muse.figures(muse.read_logs(out), reference)
    _finish(out, f"MUSE {corpus.value}", figures, muse.not_measured(reference is not None))


@eval_app.command("fluency")
def fluency_command(
    model: options.Model,
    out: options.Out,
    judge_url: Annotated[
        str, typer.Option(help="Base URL of an OpenAI-compatible API, `/v1` included.")
    ],
    judge_model: Annotated[str, typer.Option(help="The judge's name there.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSON lines of `instruction`. [default: rwku/fluency.jsonl]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the answers, which are sampled.")] = 0,
    limit: options.Limit = None,
    substrate: options.SubstrateDir = None,
    domain: options.Domain = None,
    server: options.Server = None,
    served_model: options.ServedModelName = "demo",
    data: options.Data = None,
    device: options.Device = "auto",
) -> None:
    """Fluency from 1 to 5, five answers a prompt, by a judge. Its API key is read from OPENAI_API_KEY.

    Exits with 1 if the judge is down; the page says so, and a repeated command goes on.
    """
    source = _source(model, device, substrate, domain, server, served_model)
    default = (data or default_data_dir()) / "rwku" / rwku.FLUENCY_FILE
    instructions = read_instructions(prompts or default, limit)
    members = fluency.parts_of(instructions)
    reasons: dict[str, str] = {}
    with contextlib.closing(Judge(judge_url, judge_model)) as judge, source.open() as opened:
        key = {
            **opened.what,
            "benchmark": "fluency",
            "judge": judge_model,
            "prompts": digest([PROMPT, *instructions]),
            "seed": seed,
        }
        parts: dict[str, Callable[[], Schema]] = {
            name: partial(fluency.evaluate_prompts, opened.model, judge, part, seed=seed + number)
            for number, (name, part) in enumerate(members.items())
        }
        try:
            run_parts(out, key, parts, RichReporter())
        except JudgeError as error:
            reasons = dict.fromkeys(fluency.FIGURES, f"not measured: {error}")
    figures: dict[str, float | None] = dict.fromkeys(fluency.FIGURES)
    if not reasons:
        logs = [read_log(out / f"{name}.json", fluency.ScoresLog) for name in members]
        figures = fluency.figures(logs)
        reasons = dict.fromkeys(fluency.FIGURES, "not measured: no reply of the judge was a score")
    _finish(
        out,
        f"Fluency, judged by {judge_model}",
        figures,
        reasons,
        notes=f"The judge's prompt:\n\n```text\n{PROMPT}\n```",
    )
    if figures["fluency_mean"] is None:
        raise typer.Exit(1)


eval_app.command("interference")(interference_command)


def _source(
    model: Path,
    device: str,
    substrate: Path | None,
    domain: list[str] | None,
    server: str | None,
    served_model: str,
) -> Source:
    return Source(
        model=model,
        device=device,
        substrate=substrate,
        domains=domain or (),
        server=server,
        served_model=served_model,
    )


def _names(argument: str) -> list[str]:
    return [name.strip() for name in argument.split(",") if name.strip()]


def _holdout(base: BaseModel, files: list[Path]) -> list[EncodedRow]:
    if not files:
        return []
    return encode_rows(read_rows(files), base.tokenizer, max_tokens=base.max_tokens)


def _finish(
    out: Path,
    title: str,
    figures: Mapping[str, float | None],
    reasons: Mapping[str, str] | None = None,
    **page: Any,
) -> None:
    """Writes figures and page, and shows both."""
    out.mkdir(parents=True, exist_ok=True)
    write_figures(out, figures)
    path = write_page(out, title, figures, reasons or {}, plots={}, **page)
    _show(figures, reasons or {})
    typer.echo(f"page: {path}")


def _show(figures: Mapping[str, float | None], reasons: Mapping[str, str]) -> None:
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, reasons.get(name, "-") if value is None else f"{value:.4f}")
    Console().print(table)
