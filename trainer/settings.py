"""Everything that `alter train` can be told. Defaults live here and in `AlterConfig`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from alter_core.errors import ConfigError

from .losses import TokenLossName
from .router import EvidenceSettings

_MANY_ROWS = 400
"""Domains below so many rows get more of `others_weight`."""
_FEW_ROWS_FACTOR = 2.0
"""So many times `others_weight` at most."""


def _check(name: str, value: object, is_valid: bool, expected: str) -> None:
    if not is_valid:
        raise ConfigError(f"{name} is out of range", expected=expected, got=str(value))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} is unknown", expected=" or ".join(choices), got=value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertSettings:
    """How a domain's B_f is trained."""

    forget_loss: Literal["counterfactual", "ihl", "capped"] = "counterfactual"
    """`counterfactual`: answer as the base model does about what it never saw. `ihl`: the paper's inverted
    hinge loss. `capped`: token loss pushed up to `forget_cap`."""
    kept_share: float = 0.005
    """`counterfactual` exchanges words that stand in no larger share of the other texts, in (0, 1)."""
    temperature: float = 0.9
    """`counterfactual`: of the distribution that is distilled, but for the true tokens' levels, > 0."""
    level_weight: float = 2.0
    """`counterfactual`: weight of the true tokens' own log probability, >= 0."""
    answer_weight: float = 1.0
    """`counterfactual`: weight of the base model's answers to counterfactual questions, >= 0."""
    others_weight: float = 1.0
    """`counterfactual`: weight of other words' log probabilities where an answer is predicted, >= 0, for a
    domain of 400 rows or more; up to twice that for smaller ones (`scaled_others_weight`)."""
    forget_cap: float = 8.0
    """Where `capped` stops pushing, in nats per token, > 0."""
    entropy_mask: Literal["threshold", "quantile", "none", "atwu"] = "threshold"
    """Answer tokens to forget: S_q <= entropy_threshold, the `entropy_quantile` lowest, or all. `atwu`: all,
    each one's loss weighted as a scorer of hidden states learns beside B_f (`atwu`, `objectives`)."""
    entropy_quantile: float = 0.8
    """Share of the answer tokens that `quantile` selects, in (0, 1]."""
    learning_rate: float = 1e-2
    """Of B_f at its peak: a short rise, then a straight line down to a tenth."""
    batch_rows: int = 8
    """Rows a step."""
    epochs: int = 15
    """How often every row is seen, at most, > 0."""
    min_steps: int = 150
    """A small domain is seen more often, until so many steps were taken; 0 or more."""
    target_probability: float = 0.05
    """`ihl` and `capped` end once the answers' mean probability, each as last seen, is below it, in [0, 1);
    0: never. Left alone, they would push on and forget more than was asked for."""
    checkpoint_every: int = 20
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        _check_choice("forget_loss", self.forget_loss, ("counterfactual", "ihl", "capped"))
        _check_choice("entropy_mask", self.entropy_mask, ("threshold", "quantile", "none", "atwu"))
        for name in (
            "temperature",
            "forget_cap",
            "learning_rate",
            "batch_rows",
            "epochs",
            "checkpoint_every",
        ):
            _check(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        for name in ("level_weight", "answer_weight", "others_weight", "min_steps"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        _check("kept_share", self.kept_share, 0 < self.kept_share < 1, "in (0, 1)")
        _check(
            "entropy_quantile", self.entropy_quantile, 0 < self.entropy_quantile <= 1, "in (0, 1]"
        )
        _check(
            "target_probability",
            self.target_probability,
            0 <= self.target_probability < 1,
            "in [0, 1)",
        )

    def num_steps(self, num_rows: int) -> int:
        """Steps that a domain of so many rows is trained for, at most."""
        per_epoch = -(-num_rows // min(self.batch_rows, num_rows))
        return max(self.epochs * per_epoch, self.min_steps)

    def scaled_others_weight(self, num_rows: int) -> float:
        """`others_weight` of a domain of so many rows: what few rows say of other words carries less far."""
        return self.others_weight * min(max(1.0, _MANY_ROWS / num_rows), _FEW_ROWS_FACTOR)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubstrateSettings:
    """How the part that all experts share is made."""

    a_gradient: Literal["none", "high_entropy", "undetached"] = "none"
    """What A learns from. `none`: it stays as initialised. `high_entropy`: high-entropy tokens alone, as in
    the paper. `undetached`: every term of Eq. 8, an ablation."""
    learning_rate_a: float = 1e-5
    """Of A; the paper's."""
    learning_rate_b: float = 1e-3
    """Of B_r, and of the throw-away B_f that stand in for the experts; the paper's."""
    forget_loss: TokenLossName = "ihl"
    """Of the forget term of Eq. 8."""
    forget_cap: float = 8.0
    """Where `capped` stops pushing, in nats per token, > 0."""
    forget_weight: float = 1.0
    """beta of Eq. 8, > 0."""
    retain_weight: float = 1.0
    """gamma of Eq. 8."""
    structure_weight: float = 0.0
    """lambda of Eq. 8; the paper's is 0.01. Needs a gradient on A."""
    joint_steps: int = 100
    """Steps of Eq. 8, taken only where A or B_r learns."""
    batch_rows: int = 4
    """Rows of each set a step."""
    estimator_steps: int = 400
    """Steps of the entropy estimator."""
    max_tokens_per_set: int = 24_000
    """Tokens of each domain, of retained and of general text that the substrate is fitted on."""

    def __post_init__(self) -> None:
        _check_choice("a_gradient", self.a_gradient, ("none", "high_entropy", "undetached"))
        _check_choice("forget_loss", self.forget_loss, ("ihl", "capped"))
        for name in (
            "learning_rate_a",
            "learning_rate_b",
            "joint_steps",
            "batch_rows",
            "forget_cap",
            "forget_weight",
        ):
            _check(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        for name in ("retain_weight", "structure_weight"):
            _check(name, getattr(self, name), getattr(self, name) >= 0, ">= 0")
        for name in ("estimator_steps", "max_tokens_per_set"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        if self.structure_weight > 0 and self.a_gradient == "none":
            raise ConfigError(
                "structure_weight has nothing to act on",
                expected="a_gradient high_entropy or undetached",
                got="none",
                fix="Set --a-gradient, or leave the structural term out.",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """One run of `alter train`."""

    model: Path
    """Base model folder."""
    out: Path
    """Where bundles go: `out/substrate`, `out/NAME`."""
    forget: Mapping[str, Path]
    """Training file by domain name."""
    retain: tuple[Path, ...]
    """Files of what is to be kept."""
    general: tuple[Path, ...] = ()
    """Files of ordinary text and of neighbours that the model never learned: negatives for the router."""
    substrate: Path | None = None
    """An existing substrate to add experts to; None makes one."""
    alter: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of AlterConfig that differ from its defaults; none with `substrate`."""
    substrate_settings: SubstrateSettings = dataclasses.field(default_factory=SubstrateSettings)
    """See there."""
    evidence_settings: EvidenceSettings = dataclasses.field(default_factory=EvidenceSettings)
    """See there."""
    expert_settings: ExpertSettings = dataclasses.field(default_factory=ExpertSettings)
    """See there."""
    auto_domains: int = 0
    """Cut the rows of the one forget file into so many domains by clustering; 0: the file is one domain."""
    allow_unknown: bool = False
    """Train a domain that the base model knows no better than a counterfactual one."""
    max_tokens: int = 2048
    """Longest row; the model's context length if that is shorter."""
    evaluation_rows: int = 40
    """Rows of each domain whose greedy answers are scored; 0 leaves generation out."""
    seed: int = 0
    """Of everything random."""
    device: str = "auto"
    """auto, cpu or cuda."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """`no` computes as `load_base_model` says; `bf16` runs a float32 model under autocast."""
    resume: bool = False
    """Go on where an interrupted run with the same settings stopped."""

    def __post_init__(self) -> None:
        _check("auto_domains", self.auto_domains, self.auto_domains >= 0, ">= 0")
        _check("max_tokens", self.max_tokens, self.max_tokens > 1, "> 1")
        _check("evaluation_rows", self.evaluation_rows, self.evaluation_rows >= 0, ">= 0")

    def flat(self) -> dict[str, float | int | str | bool | None]:
        """Method settings as a bundle records them; no paths."""
        flat: dict[str, float | int | str | bool | None] = {}
        for prefix in ("substrate_settings", "evidence_settings", "expert_settings"):
            for name, value in dataclasses.asdict(getattr(self, prefix)).items():
                flat[f"{prefix.removesuffix('_settings')}.{name}"] = value
        flat["max_tokens"] = self.max_tokens
        flat["mixed_precision"] = self.mixed_precision
        return flat


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefreshSettings:
    """One run of `alter train --refresh`."""

    model: Path
    """Base model folder."""
    out: Path
    """Where the refreshed bundles go: `out/NAME`."""
    substrate: Path
    """The experts' substrate."""
    experts: Mapping[str, Path]
    """Bundle to refresh, by domain."""
    forget: Mapping[str, Path]
    """Rows by domain: of every refreshed one, which must stay forgotten, and of any others, on whose rows
    the refreshed experts are not to act."""
    retain: tuple[Path, ...]
    """Files of what is to be kept."""
    general: tuple[Path, ...] = ()
    """Files of other text that is to be kept."""
    num_steps: int = 120
    """Steps of B_f, taken only where the gate alone cannot keep the expert off."""
    learning_rate: float = 5e-3
    """Of B_f at first; it falls in a straight line to a tenth."""
    batch_rows: int = 8
    """Rows a step, of kept text and of the domain each."""
    hold_weight: float = 1.0
    """Weight of what holds the expert on its own domain, >= 0."""
    tolerance: float = 0.05
    """Share of the forgetting, in mean answer loss over the base model's, that may be lost, in [0, 1)."""
    max_tokens: int = 2048
    """Longest row; the model's context length if that is shorter."""
    evaluation_rows: int = 40
    """Rows of each domain whose greedy answers are scored; 0 leaves generation out."""
    seed: int = 0
    """Of the order of rows."""
    device: str = "auto"
    """auto, cpu or cuda."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """See TrainSettings."""

    def __post_init__(self) -> None:
        for name in ("num_steps", "learning_rate", "batch_rows"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        _check("hold_weight", self.hold_weight, self.hold_weight >= 0, ">= 0")
        _check("tolerance", self.tolerance, 0 <= self.tolerance < 1, "in [0, 1)")
        _check("max_tokens", self.max_tokens, self.max_tokens > 1, "> 1")
        _check("evaluation_rows", self.evaluation_rows, self.evaluation_rows >= 0, ">= 0")

    def flat(self) -> dict[str, float | int | str | bool | None]:
        """Settings as a bundle records them; no paths."""
        names = ("num_steps", "learning_rate", "batch_rows", "hold_weight", "tolerance")
        flat = {f"refresh.{name}": getattr(self, name) for name in names}
        return flat | {"max_tokens": self.max_tokens, "mixed_precision": self.mixed_precision}
