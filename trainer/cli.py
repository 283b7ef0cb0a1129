"""`alter train`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from alter_core.config import AlterConfig
from alter_core.errors import ConfigError

from .progress import RichReporter
from .router import EvidenceSettings
from .run import train
from .settings import ExpertSettings, SubstrateSettings, TrainSettings

_ALTER = {field.name: field.default for field in dataclasses.fields(AlterConfig)}
_EXPERT = ExpertSettings()
_SUBSTRATE = SubstrateSettings()
_TRAIN = {field.name: field.default for field in dataclasses.fields(TrainSettings)}


def _method(name: str) -> str:
    """Help suffix: method options are None unless given, since a substrate may fix them."""
    return f"[default: {_ALTER[name]}; fixed by --substrate]"


def train_command(
    model: Annotated[Path, typer.Argument(help="Base model folder, transformers layout.")],
    out: Annotated[Path, typer.Option(help="Folder for the bundles and run.json.")],
    forget: Annotated[
        list[str], typer.Option(help="Domain and its rows, NAME=FILE.jsonl; repeatable.")
    ],
    retain: Annotated[list[Path], typer.Option(help="Rows to be kept; repeatable.")],
    general: Annotated[
        list[Path] | None,
        typer.Option(help="Ordinary text and never-learned neighbours; repeatable."),
    ] = None,
    substrate: Annotated[
        Path | None, typer.Option(help="Add experts to this substrate instead of making one.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted run.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = _TRAIN["seed"],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = _TRAIN["device"],
    mixed_precision: Annotated[
        str, typer.Option(help="no: the checkpoint's dtype; bf16: autocast.")
    ] = _TRAIN["mixed_precision"],
    max_tokens: Annotated[int, typer.Option(help="Longest row, in tokens.")] = _TRAIN["max_tokens"],
    evaluation_rows: Annotated[
        int, typer.Option(help="Rows per domain whose greedy answers are scored.")
    ] = _TRAIN["evaluation_rows"],
    forget_loss: Annotated[str, typer.Option(help="ihl or capped.")] = _EXPERT.forget_loss,
    forget_cap: Annotated[float, typer.Option(help="Cap of `capped`, nats.")] = _EXPERT.forget_cap,
    entropy_mask: Annotated[
        str, typer.Option(help="Answer tokens to forget: threshold, quantile or none.")
    ] = _EXPERT.entropy_mask,
    entropy_quantile: Annotated[
        float, typer.Option(help="Share that `quantile` selects.")
    ] = _EXPERT.entropy_quantile,
    learning_rate: Annotated[float, typer.Option(help="Of B_f.")] = _EXPERT.learning_rate,
    batch_rows: Annotated[int, typer.Option(help="Rows a step.")] = _EXPERT.batch_rows,
    max_steps: Annotated[int, typer.Option(help="Steps per domain at most.")] = _EXPERT.max_steps,
    target_probability: Annotated[
        float, typer.Option(help="Stop once answers are this improbable; 0: never.")
    ] = _EXPERT.target_probability,
    a_gradient: Annotated[
        str, typer.Option(help="What A learns from: none, high_entropy or undetached.")
    ] = _SUBSTRATE.a_gradient,
    retain_weight: Annotated[
        float, typer.Option(help="gamma of Eq. 8.")
    ] = _SUBSTRATE.retain_weight,
    structure_weight: Annotated[
        float, typer.Option(help="lambda of Eq. 8.")
    ] = _SUBSTRATE.structure_weight,
    joint_steps: Annotated[
        int, typer.Option(help="Steps of Eq. 8, if A or B_r learns.")
    ] = _SUBSTRATE.joint_steps,
    rank: Annotated[int | None, typer.Option(help=f"r. {_method('rank')}")] = None,
    lora_alpha: Annotated[
        float | None, typer.Option(help=f"Scale times r. {_method('lora_alpha')}")
    ] = None,
    tap_layer: Annotated[
        int | None, typer.Option(help="First adapted layer. [default: a third of the depth]")
    ] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Adapted inputs. [default: qkv,o,gate_up,down]")
    ] = None,
    retain_expert: Annotated[
        str | None, typer.Option(help=f"identity or trained. {_method('retain_expert')}")
    ] = None,
    tsallis_q: Annotated[
        float | None, typer.Option(help=f"q of Eq. 5. {_method('tsallis_q')}")
    ] = None,
    entropy_threshold: Annotated[
        float | None,
        typer.Option(help=f"S_q of the high path. {_method('entropy_threshold')}"),
    ] = None,
    entropy_source: Annotated[
        str | None, typer.Option(help=f"estimator or two_pass. {_method('entropy_source')}")
    ] = None,
    router: Annotated[
        str | None, typer.Option(help=f"evidence or scalar. {_method('router')}")
    ] = None,
    evidence_window: Annotated[
        int | None, typer.Option(help=f"Tokens. {_method('evidence_window')}")
    ] = None,
    evidence_ngram: Annotated[
        int | None, typer.Option(help=f"Tokens. {_method('evidence_ngram')}")
    ] = None,
    evidence_units: Annotated[
        int | None, typer.Option(help=f"Hidden units. {_method('evidence_units')}")
    ] = None,
) -> None:
    """Train a substrate and one forget expert per domain.

    A line of a file is {"question", "answer"}, {"prompt", "completion"}, {"messages"} or {"text"}.
    """
    method: dict[str, Any] = {
        "rank": rank,
        "lora_alpha": lora_alpha,
        "tap_layer": tap_layer,
        "target_modules": tuple(target_modules.split(",")) if target_modules else None,
        "retain_expert": retain_expert,
        "tsallis_q": tsallis_q,
        "entropy_threshold": entropy_threshold,
        "entropy_source": entropy_source,
        "router": router,
        "evidence_window": evidence_window,
        "evidence_ngram": evidence_ngram,
        "evidence_units": evidence_units,
    }
    settings = TrainSettings(
        model=model,
        out=out,
        forget=_domains(forget),
        retain=tuple(retain),
        general=tuple(general or ()),
        substrate=substrate,
        alter={name: value for name, value in method.items() if value is not None},
        substrate_settings=SubstrateSettings(
            a_gradient=a_gradient,  # type: ignore[arg-type]  # checked there
            retain_weight=retain_weight,
            structure_weight=structure_weight,
            joint_steps=joint_steps,
        ),
        evidence_settings=EvidenceSettings(),
        expert_settings=ExpertSettings(
            forget_loss=forget_loss,  # type: ignore[arg-type]  # checked there
            forget_cap=forget_cap,
            entropy_mask=entropy_mask,  # type: ignore[arg-type]  # checked there
            entropy_quantile=entropy_quantile,
            learning_rate=learning_rate,
            batch_rows=batch_rows,
            max_steps=max_steps,
            target_probability=target_probability,
        ),
        max_tokens=max_tokens,
        evaluation_rows=evaluation_rows,
        seed=seed,
        device=device,
        mixed_precision=mixed_precision,  # type: ignore[arg-type]  # checked there
        resume=resume,
    )
    result = train(settings, RichReporter())
    typer.echo(f"substrate\t{result.substrate}")
    for name, path in result.experts.items():
        typer.echo(f"{name}\t{path}")


def _domains(arguments: list[str]) -> dict[str, Path]:
    domains: dict[str, Path] = {}
    for argument in arguments:
        name, separator, file = argument.partition("=")
        if not separator or not file:
            raise ConfigError("--forget is malformed", expected="NAME=FILE.jsonl", got=argument)
        if name in domains:
            raise ConfigError("--forget names a domain twice", expected="one file each", got=name)
        domains[name] = Path(file)
    return domains
