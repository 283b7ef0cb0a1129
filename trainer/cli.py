"""`alter train`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from alter_core.config import SITE_KINDS, AlterConfig
from alter_core.errors import ConfigError

from .progress import RichReporter
from .run import train
from .settings import ExpertSettings, SubstrateSettings, TrainSettings

_EXPERT = ExpertSettings()
_SHARED = SubstrateSettings()
_CONFIG = AlterConfig(tap_layer=0)


class ForgetLoss(StrEnum):
    """See `ExpertSettings.forget_loss`."""

    IHL = "ihl"
    CAPPED = "capped"


class EntropyMask(StrEnum):
    """See `ExpertSettings.entropy_mask`."""

    THRESHOLD = "threshold"
    QUANTILE = "quantile"
    NONE = "none"


class AGradient(StrEnum):
    """See `SubstrateSettings.a_gradient`."""

    NONE = "none"
    HIGH_ENTROPY = "high_entropy"
    UNDETACHED = "undetached"


class RetainExpert(StrEnum):
    """See `AlterConfig.retain_expert`."""

    IDENTITY = "identity"
    TRAINED = "trained"


class Router(StrEnum):
    """See `AlterConfig.router`."""

    EVIDENCE = "evidence"
    SCALAR = "scalar"


_METHOD = "Method (new substrate only)"
_SUBSTRATE = "Substrate training"
_EXPERTS = "Expert training"


def train_command(
    model: Annotated[Path, typer.Argument(help="Folder of the base model.")],
    out: Annotated[Path, typer.Option(help="Folder for the bundles.")],
    forget: Annotated[
        list[str], typer.Option(metavar="NAME=FILE.jsonl", help="A forget domain; repeatable.")
    ],
    retain: Annotated[list[Path], typer.Option(help="JSON lines to be kept; repeatable.")],
    general: Annotated[
        list[Path] | None,
        typer.Option(help="JSON lines on which no expert may fire; repeatable."),
    ] = None,
    substrate: Annotated[
        Path | None, typer.Option(help="Add experts to this substrate; it is left as it is.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    mixed_precision: Annotated[str, typer.Option(help="no or bf16.")] = "no",
    max_tokens: Annotated[int | None, typer.Option(help="Longest row, tokens.")] = None,
    rank: Annotated[int | None, typer.Option(rich_help_panel=_METHOD)] = None,
    lora_alpha: Annotated[float | None, typer.Option(rich_help_panel=_METHOD)] = None,
    tap_layer: Annotated[
        int | None, typer.Option(help="First adapted layer.", rich_help_panel=_METHOD)
    ] = None,
    target_modules: Annotated[
        str | None, typer.Option(help=f"Out of {','.join(SITE_KINDS)}.", rich_help_panel=_METHOD)
    ] = None,
    retain_expert: Annotated[RetainExpert | None, typer.Option(rich_help_panel=_METHOD)] = None,
    router: Annotated[
        Router | None,
        typer.Option(help="`scalar` is Eq. 7 to the letter; not served.", rich_help_panel=_METHOD),
    ] = None,
    tsallis_q: Annotated[float | None, typer.Option(rich_help_panel=_METHOD)] = None,
    entropy_threshold: Annotated[float | None, typer.Option(rich_help_panel=_METHOD)] = None,
    evidence_window: Annotated[int | None, typer.Option(rich_help_panel=_METHOD)] = None,
    evidence_ngram: Annotated[int | None, typer.Option(rich_help_panel=_METHOD)] = None,
    a_gradient: Annotated[
        AGradient, typer.Option(help="What A learns from.", rich_help_panel=_SUBSTRATE)
    ] = AGradient(_SHARED.a_gradient),
    structure_weight: Annotated[
        float, typer.Option(help="lambda of Eq. 8.", rich_help_panel=_SUBSTRATE)
    ] = _SHARED.structure_weight,
    forget_weight: Annotated[
        float, typer.Option(help="beta of Eq. 8.", rich_help_panel=_SUBSTRATE)
    ] = _SHARED.forget_weight,
    retain_weight: Annotated[
        float, typer.Option(help="gamma of Eq. 8.", rich_help_panel=_SUBSTRATE)
    ] = _SHARED.retain_weight,
    learning_rate_a: Annotated[
        float, typer.Option(rich_help_panel=_SUBSTRATE)
    ] = _SHARED.learning_rate_a,
    substrate_steps: Annotated[int, typer.Option(rich_help_panel=_SUBSTRATE)] = _SHARED.steps,
    forget_loss: Annotated[ForgetLoss, typer.Option(rich_help_panel=_EXPERTS)] = ForgetLoss(
        _EXPERT.forget_loss
    ),
    loss_cap: Annotated[
        float, typer.Option(help="Nats.", rich_help_panel=_EXPERTS)
    ] = _EXPERT.loss_cap,
    entropy_mask: Annotated[EntropyMask, typer.Option(rich_help_panel=_EXPERTS)] = EntropyMask(
        _EXPERT.entropy_mask
    ),
    entropy_quantile: Annotated[
        float, typer.Option(rich_help_panel=_EXPERTS)
    ] = _EXPERT.entropy_quantile,
    learning_rate: Annotated[
        float, typer.Option(help="Of B.", rich_help_panel=_EXPERTS)
    ] = _EXPERT.learning_rate,
    max_steps: Annotated[int, typer.Option(rich_help_panel=_EXPERTS)] = _EXPERT.max_steps,
    batch_rows: Annotated[int, typer.Option(rich_help_panel=_EXPERTS)] = _EXPERT.batch_rows,
    target_probability: Annotated[
        float,
        typer.Option(help="Stop at this mean answer probability.", rich_help_panel=_EXPERTS),
    ] = _EXPERT.target_probability,
) -> None:
    """Train a substrate and forget experts, or add experts to a substrate."""
    given: dict[str, object] = {
        "rank": rank,
        "lora_alpha": lora_alpha,
        "tap_layer": tap_layer,
        "target_modules": tuple(target_modules.split(",")) if target_modules is not None else None,
        "retain_expert": retain_expert.value if retain_expert else None,
        "router": router.value if router else None,
        "tsallis_q": tsallis_q,
        "entropy_threshold": entropy_threshold,
        "evidence_window": evidence_window,
        "evidence_ngram": evidence_ngram,
    }
    settings = TrainSettings(
        model=model,
        out=out,
        forget=_named_files(forget),
        retain=tuple(retain),
        general=tuple(general or ()),
        substrate=substrate,
        resume=resume,
        seed=seed,
        device=device,
        mixed_precision=mixed_precision,
        max_tokens=max_tokens,
        config={name: value for name, value in given.items() if value is not None},
        experts=ExpertSettings(
            forget_loss=forget_loss.value,
            loss_cap=loss_cap,
            entropy_mask=entropy_mask.value,
            entropy_quantile=entropy_quantile,
            learning_rate=learning_rate,
            max_steps=max_steps,
            batch_rows=batch_rows,
            target_probability=target_probability,
        ),
        shared=SubstrateSettings(
            a_gradient=a_gradient.value,
            forget_weight=forget_weight,
            retain_weight=retain_weight,
            structure_weight=structure_weight,
            learning_rate_a=learning_rate_a,
            steps=substrate_steps,
        ),
    )
    result = train(settings, RichReporter())
    console = Console()
    console.print(f"substrate: {result.substrate}", highlight=False)
    for name, folder in result.experts.items():
        console.print(f"{name}: {folder}", highlight=False)


def _named_files(values: list[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for value in values:
        name, separator, path = value.partition("=")
        if not separator or name in files:
            raise ConfigError(
                "A forget domain is not usable",
                expected="NAME=FILE.jsonl, each name once",
                got=value,
            )
        files[name] = Path(path)
    return files
