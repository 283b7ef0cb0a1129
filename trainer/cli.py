"""`alter train`."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from alter_core.config import SITE_KINDS, AlterConfig
from alter_core.errors import ConfigError

from .progress import RichReporter
from .refresh import refresh_experts
from .router import EvidenceSettings
from .run import train
from .settings import ExpertSettings, RefreshSettings, SubstrateSettings, TrainSettings

_METHOD = "Method (of a new substrate; an existing one fixes it)"
_SHARED = "Substrate training"
_EXPERTS = "Expert training"
_REFRESH = "Refresh (of existing experts, instead of training any)"
_CONFIG = AlterConfig(tap_layer=0)
_SUBSTRATE = SubstrateSettings()
_EXPERT = ExpertSettings()
_EVIDENCE = EvidenceSettings()
_RUN = TrainSettings(model=Path(), out=Path(), forget={}, retain=())
_REFRESHED = RefreshSettings(
    model=Path(), out=Path(), substrate=Path(), experts={}, forget={}, retain=()
)
_REFRESH_ALONE = {"refresh", "refresh_steps", "refresh_tolerance"}
_REFRESH_OPTIONS = _REFRESH_ALONE | {
    *("model", "out", "forget", "retain", "general", "substrate", "max_tokens"),
    *("evaluation_rows", "seed", "device", "mixed_precision"),
}
"""What a refresh listens to; anything else beside --refresh is refused."""


class ForgetLoss(StrEnum):
    """See `ExpertSettings.forget_loss`."""

    COUNTERFACTUAL = "counterfactual"
    IHL = "ihl"
    CAPPED = "capped"


class EntropyMask(StrEnum):
    """See `ExpertSettings.entropy_mask`."""

    THRESHOLD = "threshold"
    QUANTILE = "quantile"
    NONE = "none"
    ATWU = "atwu"


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


class EntropySource(StrEnum):
    """See `AlterConfig.entropy_source`."""

    ESTIMATOR = "estimator"
    TWO_PASS = "two_pass"


class MixedPrecision(StrEnum):
    """See `TrainSettings.mixed_precision`."""

    NO = "no"
    BF16 = "bf16"


_MIXED_PRECISION = MixedPrecision(_RUN.mixed_precision)
_FORGET_LOSS = ForgetLoss(_EXPERT.forget_loss)
_ENTROPY_MASK = EntropyMask(_EXPERT.entropy_mask)
_A_GRADIENT = AGradient(_SUBSTRATE.a_gradient)


def _method(text: str, default: object) -> Any:
    """An option that is None unless given, since an existing substrate has the say."""
    return typer.Option(help=f"{text} \\[default: {default}]", rich_help_panel=_METHOD)


def _shared(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=_SHARED)


def _experts(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=_EXPERTS)


def train_command(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Base model folder, transformers layout.")],
    out: Annotated[Path, typer.Option(help="Folder for the bundles and run.json.")],
    forget: Annotated[
        list[str],
        typer.Option(metavar="NAME=FILE.jsonl", help="A domain and its rows; repeatable."),
    ],
    retain: Annotated[list[Path], typer.Option(help="Rows to be kept; repeatable.")],
    general: Annotated[
        list[Path] | None,
        typer.Option(help="Ordinary text and never-learned neighbours; repeatable."),
    ] = None,
    substrate: Annotated[
        Path | None, typer.Option(help="Add experts to this substrate instead of making one.")
    ] = None,
    auto_domains: Annotated[
        int, typer.Option(help="Cut the one --forget file into so many domains.")
    ] = _RUN.auto_domains,
    refresh: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR",
            help="Take back what this expert does to kept rows; repeatable.",
            rich_help_panel=_REFRESH,
        ),
    ] = None,
    refresh_steps: Annotated[
        int, typer.Option(help="Steps of B_f, if any are needed.", rich_help_panel=_REFRESH)
    ] = _REFRESHED.num_steps,
    refresh_tolerance: Annotated[
        float,
        typer.Option(help="Share of the forgetting that may be lost.", rich_help_panel=_REFRESH),
    ] = _REFRESHED.tolerance,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted run.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = _RUN.seed,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = _RUN.device,
    mixed_precision: Annotated[
        MixedPrecision, typer.Option(help="no: the checkpoint's dtype; bf16: autocast.")
    ] = _MIXED_PRECISION,
    max_tokens: Annotated[int, typer.Option(help="Longest row, in tokens.")] = _RUN.max_tokens,
    evaluation_rows: Annotated[
        int, typer.Option(help="Rows per domain whose greedy answers are scored.")
    ] = _RUN.evaluation_rows,
    forget_loss: Annotated[
        ForgetLoss,
        _experts("Answer as if never taught; the paper's inverted hinge; token loss up to a cap."),
    ] = _FORGET_LOSS,
    kept_share: Annotated[
        float, _experts("`counterfactual` keeps words that more of the other texts hold.")
    ] = _EXPERT.kept_share,
    temperature: Annotated[
        float, _experts("`counterfactual`: of what is distilled, but for the true tokens.")
    ] = _EXPERT.temperature,
    level_weight: Annotated[
        float, _experts("`counterfactual`: weight of the true tokens' level.")
    ] = _EXPERT.level_weight,
    answer_weight: Annotated[
        float, _experts("`counterfactual`: weight of fluent ignorant answers.")
    ] = _EXPERT.answer_weight,
    others_weight: Annotated[
        float,
        _experts("`counterfactual`: weight of other words' likelihood; grows below 400 rows."),
    ] = _EXPERT.others_weight,
    forget_cap: Annotated[float, _experts("Cap of `capped`, in nats.")] = _EXPERT.forget_cap,
    entropy_mask: Annotated[
        EntropyMask,
        _experts(
            "Answer tokens to forget: S_q below the threshold, a share, all; "
            "all, weighted as learned meanwhile."
        ),
    ] = _ENTROPY_MASK,
    entropy_quantile: Annotated[
        float, _experts("Share that `quantile` selects.")
    ] = _EXPERT.entropy_quantile,
    learning_rate: Annotated[float, _experts("Of B_f.")] = _EXPERT.learning_rate,
    batch_rows: Annotated[int, _experts("Rows a step.")] = _EXPERT.batch_rows,
    epochs: Annotated[int, _experts("How often every row is seen.")] = _EXPERT.epochs,
    min_steps: Annotated[
        int, _experts("Steps that even a small domain takes.")
    ] = _EXPERT.min_steps,
    target_probability: Annotated[
        float, _experts("`ihl`, `capped`: stop once answers are this improbable; 0: never.")
    ] = _EXPERT.target_probability,
    rewritten_dates: Annotated[
        bool, _experts("A date in a question is evidence however it is written.")
    ] = _EVIDENCE.rewritten_dates,
    allow_unknown: Annotated[
        bool, _experts("Train a domain that the base model does not seem to know.")
    ] = _RUN.allow_unknown,
    a_gradient: Annotated[
        AGradient, _shared("What A learns from; the paper: high_entropy.")
    ] = _A_GRADIENT,
    learning_rate_a: Annotated[float, _shared("Of A.")] = _SUBSTRATE.learning_rate_a,
    retain_weight: Annotated[float, _shared("gamma of Eq. 8.")] = _SUBSTRATE.retain_weight,
    structure_weight: Annotated[
        float, _shared("lambda of Eq. 8; the paper: 0.01.")
    ] = _SUBSTRATE.structure_weight,
    joint_steps: Annotated[
        int, _shared("Steps of Eq. 8, where A or B_r learns.")
    ] = _SUBSTRATE.joint_steps,
    rank: Annotated[int | None, _method("r of A and B.", _CONFIG.rank)] = None,
    lora_alpha: Annotated[
        float | None, _method("The delta is scaled by it over r.", "twice the rank")
    ] = None,
    tap_layer: Annotated[
        int | None, _method("First adapted layer.", "a third of the depth")
    ] = None,
    target_modules: Annotated[str | None, _method("Adapted inputs.", ",".join(SITE_KINDS))] = None,
    retain_expert: Annotated[RetainExpert | None, _method("B_r.", _CONFIG.retain_expert)] = None,
    tsallis_q: Annotated[float | None, _method("q of Eq. 5.", _CONFIG.tsallis_q)] = None,
    entropy_threshold: Annotated[
        float | None, _method("S_q above it is high.", _CONFIG.entropy_threshold)
    ] = None,
    entropy_source: Annotated[
        EntropySource | None, _method("`two_pass` is not served.", _CONFIG.entropy_source)
    ] = None,
    router: Annotated[
        Router | None, _method("`scalar`, Eq. 7 to the letter, is not served.", _CONFIG.router)
    ] = None,
    evidence_window: Annotated[
        int | None, _method("Tokens for which evidence lasts.", _CONFIG.evidence_window)
    ] = None,
    evidence_ngram: Annotated[
        int | None, _method("Tokens that a score reads.", _CONFIG.evidence_ngram)
    ] = None,
    evidence_units: Annotated[
        int | None, _method("Hidden units of a head.", _CONFIG.evidence_units)
    ] = None,
) -> None:
    """Train a substrate and one forget expert per domain, or add experts to a substrate.

    With --refresh, existing experts are refreshed instead: --forget gives the rows that stay forgotten.

    A line of a file is {"question", "answer"}, {"prompt", "completion"}, {"messages"} or {"text"}.
    """
    _check_options(context, substrate, is_refresh=bool(refresh))
    if refresh and substrate:
        refreshed = refresh_experts(
            RefreshSettings(
                model=model,
                out=out,
                substrate=substrate,
                experts=named_paths("--refresh", refresh),
                forget=named_paths("--forget", forget),
                retain=tuple(retain),
                general=tuple(general or ()),
                num_steps=refresh_steps,
                tolerance=refresh_tolerance,
                max_tokens=max_tokens,
                evaluation_rows=evaluation_rows,
                seed=seed,
                device=device,
                mixed_precision=mixed_precision.value,
            ),
            RichReporter(),
        )
        _show(refreshed.experts)
        return
    method: dict[str, Any] = {
        "rank": rank,
        "lora_alpha": lora_alpha,
        "tap_layer": tap_layer,
        "target_modules": tuple(target_modules.split(",")) if target_modules is not None else None,
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
        forget=named_paths("--forget", forget),
        retain=tuple(retain),
        general=tuple(general or ()),
        substrate=substrate,
        alter={name: _plain(value) for name, value in method.items() if value is not None},
        substrate_settings=SubstrateSettings(
            a_gradient=a_gradient.value,
            learning_rate_a=learning_rate_a,
            retain_weight=retain_weight,
            structure_weight=structure_weight,
            joint_steps=joint_steps,
        ),
        evidence_settings=EvidenceSettings(rewritten_dates=rewritten_dates),
        expert_settings=ExpertSettings(
            forget_loss=forget_loss.value,
            kept_share=kept_share,
            temperature=temperature,
            level_weight=level_weight,
            answer_weight=answer_weight,
            others_weight=others_weight,
            forget_cap=forget_cap,
            entropy_mask=entropy_mask.value,
            entropy_quantile=entropy_quantile,
            learning_rate=learning_rate,
            batch_rows=batch_rows,
            epochs=epochs,
            min_steps=min_steps,
            target_probability=target_probability,
        ),
        auto_domains=auto_domains,
        allow_unknown=allow_unknown,
        max_tokens=max_tokens,
        evaluation_rows=evaluation_rows,
        seed=seed,
        device=device,
        mixed_precision=mixed_precision.value,
        resume=resume,
    )
    result = train(settings, RichReporter())
    _show({"substrate": result.substrate, **result.experts})


def _check_options(context: typer.Context, substrate: Path | None, *, is_refresh: bool) -> None:
    """Raises: ConfigError for options that the other kind of run listens to, or a missing substrate."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    # By name: which click the class belongs to is typer's own matter.
    given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    ignored = given - _REFRESH_OPTIONS if is_refresh else given & _REFRESH_ALONE
    if ignored:
        raise ConfigError(
            "Some options have nothing to act on",
            expected="options of a refresh alone"
            if is_refresh
            else "--refresh NAME=DIR beside them",
            got=", ".join(f"--{name.replace('_', '-')}" for name in sorted(ignored)),
            fix="Leave them out; `alter train --help` lists what goes together.",
        )
    if is_refresh and substrate is None:
        raise ConfigError(
            "Experts need their substrate",
            expected="--substrate beside --refresh",
            got="--refresh alone",
            fix="Name the substrate that they were trained on.",
        )


def _show(bundles: Mapping[str, Path]) -> None:
    for name, path in bundles.items():
        typer.echo(f"{name}\t{path}")


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, StrEnum) else value


def named_paths(option: str, arguments: list[str]) -> dict[str, Path]:
    """Paths by name, from NAME=PATH arguments. Raises: ConfigError."""
    paths: dict[str, Path] = {}
    for argument in arguments:
        name, separator, path = argument.partition("=")
        if not separator or not path or name in paths:
            raise ConfigError(
                f"{option} is malformed",
                expected="NAME=PATH, each name once",
                got=argument,
                fix=f"Write {option} NAME=PATH, once for each name.",
            )
        paths[name] = Path(path)
    return paths
